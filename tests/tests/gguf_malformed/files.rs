//! Split files, paths that are no file, and files with holes.

use super::model::SMALL;
use super::*;
use kestrel_tests::gguf_builder::model;

/// A two-part split file; `change` may break either part.
fn split(change: impl Fn(usize, GgufBuilder) -> GgufBuilder) -> TempDir {
    let dir = TempDir::new();
    let whole = model(&SMALL);
    let n = whole.tensors.len();
    for (part, tensors) in [&whole.tensors[..7], &whole.tensors[7..]].into_iter().enumerate() {
        let mut file = GgufBuilder { tensors: tensors.to_vec(), ..GgufBuilder::default() };
        if part == 0 {
            file.pairs.clone_from(&whole.pairs);
        }
        file = file
            .kv("split.no", Raw::u16(part as u16))
            .kv("split.count", Raw::u16(2))
            .kv("split.tensors.count", Raw::i32(n as i32));
        dir.file(&format!("m-0000{}-of-00002.gguf", part + 1), &change(part, file).bytes());
    }
    dir
}

type Change = fn(usize, GgufBuilder) -> GgufBuilder;

#[test]
fn split_files() {
    let rows: [(&str, Change, Expect); 11] = [
        ("valid", |_, f| f, Accept),
        ("G86 split_count_string", |_, f| f.set("split.count", Raw::str(b"2")), Reject(Kind::WrongType)),
        ("split_count_differs", |p, f| f.set("split.count", Raw::u16(2 + p as u16)), Reject(Kind::BadName)),
        ("G108 split_no_wrong_type", |_, f| f.set("split.no", Raw::f32(0.0)), Reject(Kind::WrongType)),
        ("G108 split_no_missing", |_, f| f.unset("split.no"), Reject(Kind::Missing)),
        ("second_no_is_0", |_, f| f.set("split.no", Raw::u16(0)), Reject(Kind::Inconsistent)),
        (
            "second_in_one_piece",
            |p, f| if p == 1 { f.unset("split.count") } else { f },
            Reject(Kind::Inconsistent),
        ),
        ("tensor_count", |_, f| f.set("split.tensors.count", Raw::i32(1)), Reject(Kind::Inconsistent)),
        ("G109 duplicate_across_parts", duplicate_across_parts, Reject(Kind::Duplicate)),
        (
            "G110 other_arch",
            |p, f| if p == 1 { f.kv("general.architecture", Raw::str(b"llama")) } else { f },
            Reject(Kind::Inconsistent),
        ),
        (
            "second_part_truncated",
            |p, f| if p == 1 { GgufBuilder { n_kv: Some(1 << 50), ..f } } else { f },
            Reject(Kind::CountExceedsFile),
        ),
    ];
    for (name, change, expect) in rows {
        let dir = split(change);
        let path = dir.path().join("m-00001-of-00002.gguf");
        check(&path, 20_000, Stage::Model, &expect).unwrap_or_else(|problem| panic!("{name}: {problem}"));
    }
}

fn duplicate_across_parts(part: usize, file: GgufBuilder) -> GgufBuilder {
    let file = file.set("split.tensors.count", Raw::i32(24));
    if part == 1 { file.tensor(RawTensor::f32("token_embd.weight", &[8, 16])) } else { file }
}

#[test]
fn split_files_by_name() {
    let dir = split(|_, f| f);
    let kind = |name: &str| Gguf::open(&dir.path().join(name)).err().map(|e| e.kind());
    assert_eq!(kind("m-00002-of-00002.gguf"), Some(Kind::Usage), "not the first part");
    std::fs::copy(dir.path().join("m-00001-of-00002.gguf"), dir.path().join("other.gguf")).expect("a copy");
    assert_eq!(kind("other.gguf"), Some(Kind::BadName));
    std::fs::remove_file(dir.path().join("m-00002-of-00002.gguf")).expect("removing a part");
    assert_eq!(kind("m-00001-of-00002.gguf"), Some(Kind::Missing));

    let many = split(|_, f| f.set("split.count", Raw::u16(65535)));
    let first = many.path().join("m-00001-of-65535.gguf");
    std::fs::rename(many.path().join("m-00001-of-00002.gguf"), &first).expect("renaming a part");
    let error = Gguf::open(&first).err().expect("G87 split_count_65535");
    assert_eq!(error.kind(), Kind::Missing);
    assert!(error.to_string().contains("part 2 of 65535"), "{error}");
}

#[test]
fn paths_that_are_no_regular_file() {
    let dir = TempDir::new();
    let at = |name: &str| dir.path().join(name);
    let fifo = std::process::Command::new("mkfifo").arg(at("fifo")).status().expect("mkfifo runs");
    assert!(fifo.success());
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("a socket");
    std::os::unix::fs::symlink(at("loop"), at("loop")).expect("a symlink");
    for path in [at("fifo"), at("socket"), dir.path().to_owned(), "/dev/zero".into()] {
        let error = Gguf::open(&path).err().expect("G98");
        assert_eq!(error.kind(), Kind::NotRegularFile, "{}", path.display());
    }
    for (name, path) in [("G99 symlink_loop", at("loop")), ("absent", at("absent"))] {
        assert_eq!(Gguf::open(&path).err().expect(name).kind(), Kind::Io, "{name}");
    }
}

/// A file whose header claims much and that goes on as a hole of 1 TiB, or what the file system allows.
fn sparse(dir: &TempDir, header: &[u8]) -> std::path::PathBuf {
    let path = dir.file("sparse.gguf", header);
    let file = std::fs::File::options().write(true).open(&path).expect("opening the file");
    let largest = [40, 36, 32].into_iter().find(|&bits| file.set_len(1 << bits).is_ok());
    largest.expect("a sparse file of 4 GiB");
    path
}

#[test]
fn holes_of_a_tebibyte_are_not_read() {
    let header = GgufBuilder { n_kv: Some(60_000), n_tensors: Some(60_000), ..empty() };
    let big_array = empty().kv("k", Raw::array(8, 1 << 35, b""));
    let big_string = empty().kv("k", Raw::str_of_len(1 << 38, b""));
    for (name, header, kind) in [
        ("G97 sparse_1tib", header.header(), Kind::BadName),
        ("G97 sparse_counts", GgufBuilder { n_tensors: Some(1 << 34), ..empty() }.header(), Kind::Limit),
        ("G97 sparse_string_array", big_array.header(), Kind::Limit),
        ("G97 sparse_string", big_string.header(), Kind::Limit),
    ] {
        let dir = TempDir::new();
        let path = sparse(&dir, &header);
        let start = std::time::Instant::now();
        // Only what was really written counts as the file's size here.
        let bytes = if kind == Kind::BadName { 8 << 20 } else { header.len() };
        check(&path, bytes, Stage::Container, &Reject(kind))
            .unwrap_or_else(|problem| panic!("{name}: {problem}"));
        assert!(start.elapsed().as_secs() < 5, "{name} took {:?}", start.elapsed());
    }
}
