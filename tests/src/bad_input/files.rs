//! Split files, paths that are no file, and files with holes.

use super::*;
use crate::gguf_builder::model;

type Change = fn(usize, GgufBuilder) -> GgufBuilder;

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = split_cases();
    cases.extend(split_names());
    cases.extend(no_regular_files());
    cases.extend(holes());
    cases
}

/// Writes a two-part split file; `change` may break either part.
fn split(dir: &TempDir, change: Change) -> PathBuf {
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
    dir.path().join("m-00001-of-00002.gguf")
}

fn split_cases() -> Vec<Case> {
    let rows: [(&str, Change, Expect); 13] = [
        ("valid_split", |_, f| f, Accept),
        ("G86 split_count_string", |_, f| f.set("split.count", Raw::str(b"2")), Reject(Kind::WrongType)),
        ("G86 split_count_0", |_, f| f.set("split.count", Raw::u16(0)), Reject(Kind::Missing)),
        (
            "G87 split_count_differs",
            |p, f| f.set("split.count", Raw::u16(2 + p as u16)),
            Reject(Kind::BadName),
        ),
        ("G108 split_no_wrong_type", |_, f| f.set("split.no", Raw::f32(0.0)), Reject(Kind::WrongType)),
        ("G108 split_no_missing", |_, f| f.unset("split.no"), Reject(Kind::Missing)),
        ("G108 second_no_is_0", |_, f| f.set("split.no", Raw::u16(0)), Reject(Kind::Inconsistent)),
        (
            "G108 second_in_one_piece",
            |p, f| if p == 1 { f.unset("split.count") } else { f },
            Reject(Kind::Inconsistent),
        ),
        ("G109 tensor_count", |_, f| f.set("split.tensors.count", Raw::i32(1)), Reject(Kind::Inconsistent)),
        (
            "G109 tensor_count_negative",
            |_, f| f.set("split.tensors.count", Raw::i32(-1)),
            Reject(Kind::OutOfRange),
        ),
        ("G109 duplicate_across_parts", duplicate_across_parts, Reject(Kind::Duplicate)),
        (
            "G110 other_arch",
            |p, f| if p == 1 { f.kv("general.architecture", Raw::str(b"llama")) } else { f },
            Reject(Kind::Inconsistent),
        ),
        (
            "G12 second_part_lies",
            |p, f| if p == 1 { GgufBuilder { n_kv: Some(1 << 50), ..f } } else { f },
            Reject(Kind::CountExceedsFile),
        ),
    ];
    let case = |(name, change, expect)| {
        folder_case("split", name, expect, move |dir| split(dir, change)).by(Action::Logits)
    };
    rows.into_iter().map(case).collect()
}

fn duplicate_across_parts(part: usize, file: GgufBuilder) -> GgufBuilder {
    let file = file.set("split.tensors.count", Raw::i32(24));
    if part == 1 { file.tensor(RawTensor::f32("token_embd.weight", &[8, 16])) } else { file }
}

fn split_names() -> Vec<Case> {
    vec![
        folder_case("split", "G108 second_part_opened", Reject(Kind::Usage), |dir| {
            split(dir, |_, f| f).with_file_name("m-00002-of-00002.gguf")
        }),
        folder_case("split", "G87 other_name", Reject(Kind::BadName), |dir| {
            let other = dir.path().join("other.gguf");
            std::fs::copy(split(dir, |_, f| f), &other).expect("a copy");
            other
        }),
        folder_case("split", "G87 part_missing", RejectWith(Kind::Missing, "part 2 of 2"), |dir| {
            let first = split(dir, |_, f| f);
            std::fs::remove_file(first.with_file_name("m-00002-of-00002.gguf")).expect("removing a part");
            first
        }),
        folder_case("split", "G87 split_count_65535", RejectWith(Kind::Missing, "part 2 of 65535"), |dir| {
            let first = split(dir, |_, f| f.set("split.count", Raw::u16(65535)));
            let renamed = first.with_file_name("m-00001-of-65535.gguf");
            std::fs::rename(first, &renamed).expect("renaming a part");
            renamed
        }),
        folder_case("split", "G99 part_is_a_folder", Reject(Kind::NotRegularFile), |dir| {
            let first = split(dir, |_, f| f);
            let second = first.with_file_name("m-00002-of-00002.gguf");
            std::fs::remove_file(&second).and_then(|()| std::fs::create_dir(&second)).expect("a folder");
            first
        }),
    ]
}

fn no_regular_files() -> Vec<Case> {
    let path = |name, expect, make: fn(&TempDir) -> PathBuf| folder_case("paths", name, expect, make);
    vec![
        path("G98 pipe", Reject(Kind::NotRegularFile), |dir| {
            let pipe = dir.path().join("pipe");
            other_files::pipe(&pipe);
            pipe
        }),
        path("G98 socket", Reject(Kind::NotRegularFile), |dir| {
            let socket = dir.path().join("socket");
            drop(std::os::unix::net::UnixListener::bind(&socket).expect("a socket"));
            socket
        }),
        path("G98 folder_without_a_model", Reject(Kind::Missing), |dir| dir.path().to_owned()),
        path("G98 dev_zero", Reject(Kind::NotRegularFile), |_| "/dev/zero".into()),
        path("G98 dev_null", Reject(Kind::NotRegularFile), |_| "/dev/null".into()),
        path("G99 symlink_loop", Reject(Kind::Io), |dir| {
            let link = dir.path().join("loop");
            std::os::unix::fs::symlink(&link, &link).expect("a symlink");
            link
        }),
        path("G99 absent", Reject(Kind::Missing), |dir| dir.path().join("absent")),
    ]
}

/// A file whose header claims much and that goes on as a hole of 1 TiB, or what the file system allows.
fn sparse(dir: &TempDir, header: &[u8]) -> PathBuf {
    let path = dir.file("sparse.gguf", header);
    let file = std::fs::File::options().write(true).open(&path).expect("opening the file");
    let largest = [40, 36, 32].into_iter().find(|&bits| file.set_len(1 << bits).is_ok());
    largest.expect("a sparse file of 4 GiB");
    path
}

fn holes() -> Vec<Case> {
    let many = GgufBuilder { n_kv: Some(60_000), n_tensors: Some(60_000), ..empty() };
    let rows = [
        ("G97 sparse_1tib", many, Kind::BadName),
        ("G97 sparse_counts", GgufBuilder { n_tensors: Some(1 << 34), ..empty() }, Kind::Limit),
        ("G97 sparse_string_array", empty().kv("k", Raw::array(8, 1 << 35, b"")), Kind::Limit),
        ("G97 sparse_string", empty().kv("k", Raw::str_of_len(1 << 38, b"")), Kind::Limit),
    ];
    let case = |(name, file, kind): (_, GgufBuilder, _)| {
        folder_case("holes", name, Reject(kind), move |dir| sparse(dir, &file.header()))
    };
    rows.into_iter().map(case).collect()
}
