//! Broken safetensors files.

use super::*;
use crate::checkpoint_builder::{CheckpointBuilder, RawTensor as Tensor, safetensors, safetensors_bytes};
use kestrel_formats::limits::SAFETENSORS_HEADER_BYTES_MAX;
use serde_json::json;
use std::fs::File;

fn builder() -> CheckpointBuilder {
    CheckpointBuilder::new()
}

/// A folder whose only shard has these bytes.
fn with_shard(name: impl Into<String>, bytes: impl Into<Vec<u8>>, expect: Expect) -> Case {
    let bytes = bytes.into();
    folder_case("safetensors", name, expect, move |dir| {
        builder().write_json(dir);
        dir.file("model.safetensors", &bytes);
        dir.path().to_owned()
    })
}

/// A shard with this header text and so many bytes of data.
fn with_header(name: impl Into<String>, header: &str, n_data: usize, expect: Expect) -> Case {
    with_shard(name, safetensors_bytes(header.as_bytes(), n_data), expect)
}

/// The correct shard's header and the number of its data bytes.
fn sound() -> (String, usize) {
    let file = safetensors(&builder().tensors);
    let len = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    (String::from_utf8(file[8..8 + len].to_vec()).expect("UTF-8"), file.len() - 8 - len)
}

/// The correct shard's header with more entries in front.
fn with_entries(name: &str, entries: &str, expect: Expect) -> Case {
    let (header, n_data) = sound();
    with_header(name, &header.replacen('{', &format!("{{{entries},"), 1), n_data, expect)
}

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = whole_file();
    cases.extend(header_contents());
    cases.extend(one_tensor());
    cases
}

fn whole_file() -> Vec<Case> {
    use Kind::*;
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n";
    let over_limit = |dir: &TempDir| {
        builder().write_json(dir);
        let path = dir.file("model.safetensors", &(SAFETENSORS_HEADER_BYTES_MAX + 1).to_le_bytes());
        File::options().write(true).open(path).and_then(|f| f.set_len(64 << 20)).expect("a sparse file");
        dir.path().to_owned()
    };
    vec![
        folder_case("safetensors", "valid_folder", Accept, |dir| builder().write_into(dir)),
        folder_case("safetensors", "valid_folder_convert", Accept, |dir| builder().write_into(dir))
            .by(Action::Convert),
        with_shard("S01 empty", b"", RejectAt(Truncated, 0)),
        with_shard("S02 7_bytes", b"1234567", RejectAt(Truncated, 0)),
        with_header("S03 header_len_0", "", 100, Reject(BadJson)),
        with_shard(
            "S04 header_past_file",
            [&999u64.to_le_bytes()[..], b"{}"].concat(),
            RejectAt(CountExceedsFile, 0),
        ),
        folder_case("safetensors", "S05 header_over_limit", RejectAt(Limit, 0), over_limit),
        with_shard(
            "S06 u64_max",
            [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
            RejectAt(CountExceedsFile, 0),
        ),
        with_shard("S07 not_utf8", safetensors_bytes(b"{\"\xFF\":{}}", 0), Reject(BadJson)),
        with_header("S08 not_json", "{hello}", 0, Reject(BadJson)),
        with_header("S09 array", "[1,2,3]", 0, Reject(BadJson)),
        with_header("S10 bom", "\u{feff}{}", 0, Reject(BadJson)),
        with_shard(
            "S38 pickle",
            b"\x80\x02}q\x00(X\x06\x00\x00\x00weightq\x01K\x01u.",
            Reject(PickleRefused),
        ),
        with_shard("S39 zip", b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl", Reject(PickleRefused)),
        with_shard("S40 lfs_pointer", pointer, Reject(LfsPointer)),
        with_shard("S41 html", b"<!DOCTYPE html>\n<html><body>401</body></html>", Reject(BadMagic)),
    ]
}

fn header_contents() -> Vec<Case> {
    use Kind::*;
    let zero = r#""dtype":"F32","shape":[0],"data_offsets":[0,0]"#;
    let f16 = zero.replace("F32", "F16");
    let deep = format!(r#""x":{{"y":{}{},{zero}}}"#, "[".repeat(200_000), "]".repeat(200_000));
    let many: Vec<String> = (0..100_000).map(|i| format!(r#""t{i}":{{{zero}}}"#)).collect();
    let (header, n_data) = sound();
    let n_most = 8192 - builder().tensors.len();
    // Parts of a matrix of bitsandbytes, which the model can have: their names are known.
    let parts = move |n: usize| -> String {
        let part = |i| format!(r#""lm_head.weight.quant_state.{i}":{{{zero}}}"#);
        (0..n).map(part).collect::<Vec<_>>().join(",")
    };
    let empty_layers = move |dir: &TempDir| {
        builder().config(json!({"num_hidden_layers": 512, "tie_word_embeddings": true})).write_json(dir);
        let parts =
            ["norm.weight", "mixer.D", "mixer.A_log", "mixer.in_proj.weight", "mixer.out_proj.weight"];
        let name = |i: usize, part| format!(r#""backbone.layers.{i}.{part}":{{{zero}}}"#);
        let entries: Vec<String> = (0..512).flat_map(|i| parts.map(|part| name(i, part))).collect();
        let header = format!(r#"{{"backbone.embeddings.weight":{{{zero}}},{}}}"#, entries.join(","));
        dir.file("model.safetensors", &safetensors_bytes(header.as_bytes(), 0));
        dir.path().to_owned()
    };
    let spaced = format!(" {header}").replace(r#""shape""#, r#""note":1,"shape""#);
    vec![
        with_entries("S11 leading_space_and_metadata", r#"  "__metadata__":{"format":"pt"}"#, Accept),
        with_header("S11 S28 S34 space_unaligned_extra", &spaced, n_data, Accept),
        with_entries("S12 dup_same", &format!(r#""x":{{{zero}}},"x":{{{zero}}}"#), Reject(Duplicate)),
        with_entries("S13 dup_other_dtype", &format!(r#""x":{{{zero}}},"x":{{{f16}}}"#), Reject(Duplicate)),
        with_entries("S14 dup_metadata", r#""__metadata__":{"a":"1","a":"2"}"#, Warn("more than once")),
        with_entries("S15 metadata_non_string", r#""__metadata__":{"a":1}"#, Reject(WrongType)),
        with_entries(
            "S30 depth_200k",
            &format!(r#""__metadata__":{}"#, "[".repeat(200_000)),
            Reject(BadJson),
        ),
        with_entries("S30 depth_200k_in_field", &deep, Reject(Limit)),
        with_entries("S33 100k_tensors", &many.join(","), Reject(Unexpected)),
        with_entries("S33 as_many_unknown_as_allowed", &many[..64].join(","), Reject(Unexpected)),
        with_entries("S33 100k_parts", &parts(100_000), Reject(Limit)),
        with_entries("S33 as_many_parts_as_the_limit", &parts(n_most), Accept),
        with_entries("S33 one_part_twice", &[parts(n_most - 1), parts(1)].join(","), Reject(Duplicate)),
        folder_case("safetensors", "S33 names_of_512_layers", Reject(BadShape), empty_layers),
        with_entries("S36 path_like_name", &format!(r#""../../x":{{{zero}}}"#), Reject(Unexpected)),
        with_entries("S37 nul_name", &format!(r#""a\u0000b":{{{zero}}}"#), Reject(BadName)),
        with_entries("S37 empty_name", &format!(r#""":{{{zero}}}"#), Reject(BadName)),
        with_entries("S37 long_name", &format!(r#""{}":{{{zero}}}"#, "n".repeat(2000)), Reject(BadName)),
        with_entries("S42 zero_size_shares_offset", &format!(r#""x":{{{zero}}}"#), Reject(Unexpected)),
    ]
}

/// One tensor, described in many wrong ways.
fn one_tensor() -> Vec<Case> {
    use Kind::*;
    let rows = [
        ("S16 unknown_dtype", r#""dtype":"F99","shape":[1],"data_offsets":[0,4]"#, 4, UnknownType),
        ("S17 shape_negative", r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#, 4, BadShape),
        ("S18 shape_float", r#""dtype":"F32","shape":[1.5],"data_offsets":[0,4]"#, 4, BadShape),
        (
            "S19 product_overflow",
            r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]"#,
            4,
            BadShape,
        ),
        (
            "S20 bytes_overflow",
            r#""dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]"#,
            4,
            BadShape,
        ),
        ("S21 shape_offsets_differ", r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#, 4, Inconsistent),
        ("S22 reversed", r#""dtype":"F32","shape":[1],"data_offsets":[4,0]"#, 4, BadOffset),
        ("S23 past_eof", r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#, 4, DataOutOfBounds),
        ("S25 hole", r#""dtype":"F32","shape":[1],"data_offsets":[4,8]"#, 8, BadOffset),
        ("S26 polyglot_tail", r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#, 100, Unexpected),
        ("S27 missing_bytes", r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#, 3, DataOutOfBounds),
        ("S29 2_to_64", r#""dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]"#, 4, BadShape),
        ("S31 zero_dim_in_model", r#""dtype":"F32","shape":[0,8],"data_offsets":[0,0]"#, 0, Missing),
        ("S35 no_dtype", r#""shape":[1],"data_offsets":[0,4]"#, 4, Missing),
        ("S35 no_shape", r#""dtype":"F32","data_offsets":[0,4]"#, 4, Missing),
        ("S35 no_offsets", r#""dtype":"F32","shape":[1]"#, 4, Missing),
        ("S35 three_offsets", r#""dtype":"F32","shape":[1],"data_offsets":[0,4,4]"#, 4, BadOffset),
        ("S35 field_twice", r#""dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]"#, 4, Duplicate),
        ("S43 f64", r#""dtype":"F64","shape":[1],"data_offsets":[0,8]"#, 8, Unsupported),
        ("S43 i64", r#""dtype":"I64","shape":[1],"data_offsets":[0,8]"#, 8, Unsupported),
        ("S43 f8", r#""dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]"#, 1, Unsupported),
        ("S43 u8_bitsandbytes", r#""dtype":"U8","shape":[1],"data_offsets":[0,1]"#, 1, Missing),
        ("S43 f4_half_byte", r#""dtype":"F4","shape":[1],"data_offsets":[0,1]"#, 1, BadShape),
    ];
    let one = |(name, info, n_data, kind)| {
        with_header(name, &format!(r#"{{"x":{{{info}}}}}"#), n_data, Reject(kind))
    };
    let mut cases: Vec<Case> = rows.into_iter().map(one).collect();
    let dims = vec!["1"; 100_000].join(",");
    let many = format!(r#"{{"x":{{"dtype":"F32","shape":[{dims}],"data_offsets":[0,4]}}}}"#);
    cases.push(with_header("S32 100k_dims", &many, 4, Reject(BadShape)));
    let overlap = r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    cases.push(with_header("S24 overlap", overlap, 12, Reject(BadOffset)));
    cases.push(folder_case("safetensors", "S31 zero_rows", Reject(BadShape), |dir| {
        let mut zero = builder();
        zero.tensors[0] = Tensor::new("backbone.embeddings.weight", "BF16", &[0, 8]);
        zero.write_into(dir)
    }));
    cases
}
