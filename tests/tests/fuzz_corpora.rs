//! The corpora of the fuzz targets, replayed: what fuzzing found once stays found, on any compiler.

use kestrel_tests::bad_input::{Files, table};
use kestrel_tests::fuzz::{TARGETS, gguf_container, gguf_model};
use std::path::Path;

#[test]
fn every_corpus_runs_through_its_target() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, body) in TARGETS {
        let entries = std::fs::read_dir(corpora.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut n = 0;
        for entry in entries {
            let path = entry.expect("an entry").path();
            let bytes = std::fs::read(&path).expect("a seed");
            let run = std::panic::AssertUnwindSafe(|| body(&bytes));
            assert!(std::panic::catch_unwind(run).is_ok(), "{}", path.display());
            n += 1;
        }
        assert!(n > 0, "{name} has no corpus");
    }
}

#[test]
fn bad_gguf_files_run_through_the_targets() {
    for case in table() {
        if let Files::Gguf(bytes) = &case.files {
            gguf_container(bytes);
            gguf_model(bytes);
        }
    }
}

/// Every target of the crate is one of the list, and the other way round.
#[test]
fn the_crate_has_these_targets() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/fuzz_targets");
    let names = std::fs::read_dir(folder).expect("the targets").map(|e| e.expect("an entry").file_name());
    let mut names: Vec<String> = names.map(|n| n.to_string_lossy().replace(".rs", "")).collect();
    let mut listed: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    names.sort();
    listed.sort_unstable();
    assert_eq!(names, listed);
}
