//! Writes the table of bad inputs as files, for peers: `write_bad_inputs DIR` fills DIR with one folder per case,
//! `EXPECTED.GROUP.NAME`, where EXPECTED is `accept`, `reject-KIND`, or `either-KIND` for what is sound and yet not
//! supported here. `write_bad_inputs --fuzz DIR` writes them as seeds, one folder per fuzz target.
#![forbid(unsafe_code)]

use kestrel_formats::ErrorKind;
use kestrel_tests::bad_input::{Action, Case, Expect, Files, table, with_vocabulary};
use kestrel_tests::temp_dir::TempDir;
use std::error::Error;
use std::fs;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["--fuzz", dir] => table().iter().try_for_each(|case| seed(Path::new(dir), case)),
        [dir] => table().iter().try_for_each(|case| write(Path::new(dir), case)),
        _ => Err("usage: write_bad_inputs [--fuzz] DIR".into()),
    }
}

fn file_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// What any reader of the format should make of it.
fn expected(case: &Case) -> String {
    match &case.expect {
        // The container is sound; it is the command of the row that misses something in it.
        Expect::Reject(ErrorKind::Missing) if case.group == "container" => "accept".to_owned(),
        Expect::Accept | Expect::Warn(_) => "accept".to_owned(),
        // Nothing is wrong with such a file, it is only that it is not read here.
        Expect::Reject(kind) | Expect::RejectAt(kind, _) | Expect::RejectWith(kind, _) => match kind {
            ErrorKind::Unsupported | ErrorKind::UnsupportedTokenizer => format!("either-{kind:?}"),
            kind => format!("reject-{kind:?}"),
        },
    }
}

fn write(dir: &Path, case: &Case) -> Result<(), Box<dyn Error>> {
    let name = format!("{}.{}.{}", expected(case), file_name(case.group), file_name(&case.name));
    let folder = dir.join(name);
    fs::create_dir_all(&folder)?;
    let made = TempDir::new();
    case.make(&made);
    copy(made.path(), &folder)
}

/// Copies regular files of a sane size, and folders; links, pipes and holes make no sense elsewhere.
fn copy(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(from)? {
        let (entry, to) = (entry?.path(), to.to_owned());
        let meta = fs::symlink_metadata(&entry)?;
        let to = to.join(entry.file_name().ok_or("a name")?);
        if meta.is_dir() {
            fs::create_dir_all(&to)?;
            copy(&entry, &to)?;
        } else if meta.is_file() && meta.len() < 64 << 20 {
            fs::copy(&entry, &to)?;
        }
    }
    Ok(())
}

/// Bytes of a seed; larger cases are about a size.
const SEED_BYTES_MAX: u64 = 24 << 10;

fn put(dir: &Path, target: &str, name: &str, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    if bytes.len() as u64 <= SEED_BYTES_MAX {
        let folder = dir.join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(file_name(name)), bytes)?;
    }
    Ok(())
}

fn seed(dir: &Path, case: &Case) -> Result<(), Box<dyn Error>> {
    if let Files::Gguf(bytes) = &case.files {
        let target = if bytes.len() < 4096 { "gguf_container" } else { "gguf_model" };
        put(dir, target, &case.name, bytes)?;
        // Enough choices for a mutation.
        put(dir, "gguf_struct", &case.name, &bytes[..bytes.len().min(64)])?;
    }
    let made = TempDir::new();
    let path = case.make(&made);
    let read = |name: &str| {
        let file = path.join(name);
        let small = fs::symlink_metadata(&file).is_ok_and(|m| m.is_file() && m.len() <= SEED_BYTES_MAX);
        if small { fs::read(file).unwrap_or_default() } else { Vec::new() }
    };
    match (case.group, case.action) {
        ("safetensors", _) => put(dir, "safetensors_header", &case.name, &read("model.safetensors"))?,
        ("tokenizer", _) => put(dir, "tokenizer_json", &case.name, &read("tokenizer.json"))?,
        ("config" | "index", _) => {
            let parts =
                ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"];
            put(dir, "checkpoint_folder", &case.name, &parts.map(read).join(&[0xff, 0xfe][..]))?;
        }
        (_, Action::LoadState) => put(dir, "state_file", &case.name, &fs::read(&path)?)?,
        (_, Action::Calibration) => put(dir, "calibration", &case.name, &fs::read(&path)?)?,
        (_, Action::KlBase) => put(dir, "kl_base", &case.name, &fs::read(&path)?)?,
        (_, Action::Imatrix) => put(dir, "imatrix", &case.name, &fs::read(&path)?)?,
        ("template", _) => {
            let file = kestrel_formats::gguf::Gguf::open(&path)?;
            let template = file.metadata().str("tokenizer.chat_template")?.unwrap_or_default();
            put(dir, "chat_template", &case.name, template.as_bytes())?;
        }
        _ => {}
    }
    if case.name == "valid_vocabulary" {
        put(dir, "gguf_model", "with_vocabulary", &with_vocabulary().bytes())?;
        for (i, byte) in [0u8, 0x3f, 0x7f, 0x80, 0xff].into_iter().enumerate() {
            for ty in 0..16 {
                let bytes: Vec<u8> = (0..1500u32).map(|j| byte ^ (j * j * ty) as u8).collect();
                for target in ["dequant", "activations", "quantize"] {
                    put(dir, target, &format!("{i}.{ty}"), &[&[ty as u8], &bytes[..]].concat())?;
                }
            }
        }
        let texts: Vec<serde_json::Value> =
            serde_json::from_str(include_str!("../data/tokenizer/texts.json"))?;
        for (i, text) in texts.iter().filter_map(serde_json::Value::as_str).enumerate() {
            put(dir, "tokenizer_text", &i.to_string(), text.as_bytes())?;
        }
    }
    Ok(())
}
