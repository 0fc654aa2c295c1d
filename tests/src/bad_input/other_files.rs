//! Saved states, importance matrices, calibrations, predictions of a base model, and requests to score.

use super::weights::WIDE;
use super::*;
use crate::gguf_builder::{GgufBuilder, model};
use std::path::Path;

/// Bytes of a state's header.
const HEADER: usize = 56;

/// A header that fits `good.gguf` in all but the checksum, and so many zeros.
fn state(dir: &TempDir, change: impl Fn(&mut Vec<u8>)) -> PathBuf {
    let model = dir.file("good.gguf", &with_vocabulary().bytes());
    let model = kestrel_runtime::Model::open(&model, &Default::default()).expect("a model that loads");
    let mut bytes = model.new_state().to_bytes();
    change(&mut bytes);
    dir.file("case.state", &bytes)
}

/// Makes something at a path.
type MakeAt = fn(&Path);

pub(super) fn pipe(path: &Path) {
    let made = std::process::Command::new("mkfifo").arg(path).status().expect("mkfifo runs");
    assert!(made.success());
}

fn folder(path: &Path) {
    std::fs::create_dir(path).expect("a folder");
}

fn dev_zero(path: &Path) {
    std::os::unix::fs::symlink("/dev/zero", path).expect("a link");
}

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = states();
    cases.extend(matrices());
    cases.extend(calibrations());
    cases.extend(bases());
    cases.extend(requests());
    cases.extend(differences());
    cases.extend(no_regular_files());
    cases
}

/// What is not a file where one is expected that the command maps or reads whole. A pipe has no writer: a command that
/// opened it would wait for ever.
fn no_regular_files() -> Vec<Case> {
    let arguments = [
        ("state", Action::LoadState),
        ("imatrix", Action::Imatrix),
        ("calibration", Action::Calibration),
        ("kl_base", Action::KlBase),
        ("diff", Action::Diff),
    ];
    let inputs: [(&str, MakeAt); 3] = [("pipe", pipe), ("folder", folder), ("dev_zero", dev_zero)];
    let one = |(argument, action), (input, make): (&str, MakeAt)| {
        folder_case(
            "paths",
            format!("X95 {argument}_is_a_{input}"),
            Reject(Kind::NotRegularFile),
            move |dir| {
                dir.file("good.gguf", &with_vocabulary().bytes());
                let path = dir.path().join("case");
                make(&path);
                path
            },
        )
        .by(action)
    };
    arguments.into_iter().flat_map(|argument| inputs.map(|input| one(argument, input))).collect()
}

fn states() -> Vec<Case> {
    use Kind::*;
    let s = |name: &str, expect, change: fn(&mut Vec<u8>)| {
        folder_case("state", name, expect, move |dir| state(dir, change)).by(Action::LoadState)
    };
    vec![
        s("valid_state", Accept, |_| {}),
        s("X01 state_empty", RejectAt(Truncated, 0), Vec::clear),
        s("X02 state_in_header", RejectAt(Truncated, 55), |b| b.truncate(HEADER - 1)),
        s("X03 state_magic", RejectAt(BadMagic, 0), |b| b[0] = b'k'),
        s("X04 state_version", RejectAt(UnsupportedVersion, 8), |b| b[8] = 9),
        s("X05 state_layers_max", RejectAt(Inconsistent, 12), |b| b[12..16].fill(0xff)),
        s("X06 state_other_model", RejectAt(Inconsistent, 12), |b| b[32] ^= 1),
        s("X07 state_last_byte_missing", Reject(Truncated), |b| b.truncate(b.len() - 1)),
        s("X08 state_one_byte_more", Reject(Truncated), |b| b.push(0)),
        s("X09 state_flipped_bit", Reject(Inconsistent), |b| b[HEADER + 3] ^= 0x10),
        s("X10 state_tokens_changed", Reject(Inconsistent), |b| b[40] ^= 1),
        s("X11 state_nan", Reject(Inconsistent), |b| b[HEADER..HEADER + 4].fill(0xff)),
    ]
}

/// An importance matrix as llama-imatrix writes it, for one tensor.
fn matrix() -> GgufBuilder {
    let name = |part: &str| format!("blk.0.ssm_in.weight.{part}");
    GgufBuilder::default()
        .kv("general.type", Raw::str(b"imatrix"))
        .kv("imatrix.datasets", Raw::array(8, 0, b""))
        .kv("imatrix.chunk_count", Raw::u32(1))
        .kv("imatrix.chunk_size", Raw::u32(512))
        .tensor(RawTensor::f32(&name("in_sum2"), &[32, 1]))
        .tensor(RawTensor::f32(&name("counts"), &[1, 1]))
}

fn matrices() -> Vec<Case> {
    use Kind::*;
    let m = |name: &str, bytes: Vec<u8>, expect| {
        folder_case("imatrix", name, expect, move |dir| {
            dir.file("good.gguf", &model(&WIDE).bytes());
            dir.file("case.imatrix", &bytes)
        })
        .by(Action::Imatrix)
    };
    let gguf = |name: &str, file: GgufBuilder, expect| m(name, file.bytes(), expect);
    let sums = |n| RawTensor::f32("blk.0.ssm_in.weight.in_sum2", &[n, 1]);
    // The older format: number of entries, then per entry the length of its name, the name, calls, length, values.
    let entry = |n: i32, name_len: i32, len: i32| {
        let name = b"blk.0.ssm_in.weight";
        let numbers = [1i32.to_le_bytes(), len.to_le_bytes()].concat();
        [&n.to_le_bytes()[..], &name_len.to_le_bytes(), name, &numbers, &[0x3f; 128]].concat()
    };
    vec![
        gguf("valid_imatrix", matrix(), Warn("importance matrix")),
        m("valid_imatrix_dat", entry(1, 19, 32), Warn("importance matrix")),
        m("X20 imatrix_empty", Vec::new(), Reject(Truncated)),
        gguf("X21 imatrix_is_a_model", with_vocabulary(), Reject(Unexpected)),
        gguf("X22 imatrix_without_counts", matrix().without("blk.0.ssm_in.weight.counts"), Reject(Missing)),
        gguf("X23 imatrix_other_width", matrix().replace(sums(31)), Reject(Inconsistent)),
        m("X24 imatrix_dat_count_max", entry(i32::MAX, 19, 32), RejectAt(OutOfRange, 0)),
        m("X25 imatrix_dat_count_negative", entry(-1, 19, 32), RejectAt(OutOfRange, 0)),
        m("X26 imatrix_dat_name_max", entry(1, i32::MAX, 32), RejectAt(OutOfRange, 4)),
        m("X27 imatrix_dat_values_max", entry(1, 19, i32::MAX), RejectAt(OutOfRange, 31)),
        m("X28 imatrix_dat_cut", entry(1, 19, 33), RejectAt(Truncated, 35)),
        m("X29 imatrix_dat_of_nothing", entry(0, 19, 32), RejectAt(BadMagic, 0)),
    ]
}

const PRODUCTS: &str = "blk.0.ssm_in.weight.products";
const COUNT: &str = "blk.0.ssm_in.weight.count";
const KL: &str = "blk.0.ssm_in.weight.kl";

fn f32s(name: &str, ne: &[u64], numbers: &[f32]) -> RawTensor {
    RawTensor { data: numbers.iter().flat_map(|x| x.to_le_bytes()).collect(), ..RawTensor::f32(name, ne) }
}

/// A calibration of one matrix of [`wide_model`]: inputs that do not correlate, and two types.
pub fn calibration() -> GgufBuilder {
    let types: Vec<u8> = [b"q4_0", b"q8_0"].iter().flat_map(|name| Raw::str(*name).bytes).collect();
    let unit: Vec<f32> = (0..32 * 32).map(|i| if i % 33 == 0 { 1.0 } else { 0.0 }).collect();
    GgufBuilder::default()
        .kv("general.type", Raw::str(b"calibration"))
        .kv("kestrel.calibration.dataset", Raw::str(b"text"))
        .kv("kestrel.calibration.types", Raw::array(8, 2, &types))
        .tensor(f32s(PRODUCTS, &[32, 32], &unit))
        .tensor(f32s(COUNT, &[1], &[7.0]))
        .tensor(f32s(KL, &[2], &[0.5, 0.125]))
}

/// A model wide enough for blocks of 32.
pub fn wide_model() -> GgufBuilder {
    model(&WIDE)
}

fn calibrations() -> Vec<Case> {
    use Kind::*;
    let c = |name: &str, file: GgufBuilder, expect| {
        folder_case("calibration", name, expect, move |dir| {
            dir.file("good.gguf", &wide_model().bytes());
            dir.file("case.gguf", &file.bytes())
        })
        .by(Action::Calibration)
    };
    let with = |t: RawTensor| calibration().replace(t);
    let products = |x: f32| f32s(PRODUCTS, &[32, 32], &[x; 32 * 32]);
    let odd = RawTensor { offset: Some(4098), ..f32s(KL, &[2], &[0.5, 0.125]) };
    let f16 = RawTensor { data: vec![0; 4], ..RawTensor::without_data(KL, &[2], 1, 4) };
    vec![
        c("valid_calibration", calibration(), Accept),
        c("valid_calibration_half_done", with(f32s(COUNT, &[1], &[0.0])), Warn("calibration")),
        c("X80 calibration_is_a_model", wide_model(), Reject(Unexpected)),
        c("X81 calibration_without_count", calibration().without(COUNT), Reject(Missing)),
        c("X82 calibration_other_width", with(RawTensor::f32(PRODUCTS, &[32, 64])), Reject(Inconsistent)),
        c("X83 calibration_group_0", with(RawTensor::f32(PRODUCTS, &[0, 32])), Reject(BadShape)),
        c("X84 calibration_uneven_group", with(RawTensor::f32(PRODUCTS, &[31, 32])), Reject(BadShape)),
        c("X85 calibration_products_nan", with(products(f32::NAN)), Reject(Inconsistent)),
        c("X86 calibration_products_negative", with(products(-1.0)), Reject(Inconsistent)),
        c("X86 calibration_products_max", with(products(f32::MAX)), Reject(Inconsistent)),
        c("X87 calibration_kl_of_3", with(RawTensor::f32(KL, &[3])), Reject(BadShape)),
        c("X88 calibration_kl_nan", with(f32s(KL, &[2], &[0.5, f32::NAN])), Reject(NotFinite)),
        c("X89 calibration_kl_negative", with(f32s(KL, &[2], &[-0.5, 0.5])), Reject(OutOfRange)),
        c("X90 calibration_kl_misplaced", with(odd), Reject(BadOffset)),
        c(
            "X91 calibration_type_unknown",
            calibration().set("kestrel.calibration.types", Raw::array(8, 1, &Raw::str(b"q9").bytes)),
            Reject(Unexpected),
        ),
        c(
            "X91 calibration_types_of_numbers",
            calibration().set("kestrel.calibration.types", Raw::array(4, 1, &[0; 4])),
            Reject(WrongType),
        ),
        c("X92 calibration_kl_f16", with(f16), Reject(WrongType)),
    ]
}

/// A base of one window of 8 tokens in llama.cpp's layout or ours, for a model with 16 tokens. All are equally likely.
pub fn base(llama_cpp: bool) -> Vec<u8> {
    let (magic, head): (&[u8; 8], &[u32]) =
        if llama_cpp { (b"_logits_", &[8, 16, 1]) } else { (b"KESTRLKL", &[1, 16, 8, 1]) };
    let tokens = [3u32, 4, 5, 3, 4, 5, 3, 4];
    let row: Vec<u8> = match llama_cpp {
        true => [0f32, -(16f32.ln())].into_iter().flat_map(f32::to_le_bytes).chain([0; 32]).collect(),
        false => vec![0; 64],
    };
    let numbers = head.iter().chain(&tokens).flat_map(|n| n.to_le_bytes());
    magic.iter().copied().chain(numbers).chain(row.repeat(3)).collect()
}

fn bases() -> Vec<Case> {
    use Kind::*;
    let b = |name: &str, expect, llama_cpp, change: fn(&mut Vec<u8>)| {
        folder_case("kl base", name, expect, move |dir| {
            dir.file("good.gguf", &with_vocabulary().bytes());
            let mut bytes = base(llama_cpp);
            change(&mut bytes);
            dir.file("case.kl", &bytes)
        })
        .by(Action::KlBase)
    };
    // Where the rows begin: after magic, head and 8 tokens.
    const ROWS: (u64, u64) = (8 + 12 + 32, 8 + 16 + 32);
    vec![
        b("valid_base_llama_cpp", Accept, true, |_| {}),
        b("valid_base_f32", Accept, false, |_| {}),
        b("X40 base_empty", RejectAt(BadMagic, 0), true, Vec::clear),
        b("X41 base_magic", RejectAt(BadMagic, 0), true, |b| b[0] = b'-'),
        b("X42 base_in_head", Reject(Truncated), true, |b| b.truncate(19)),
        b("X43 base_in_head_f32", Reject(Truncated), false, |b| b.truncate(11)),
        b("X44 base_version", RejectAt(UnsupportedVersion, 8), false, |b| b[8] = 2),
        b("X45 base_other_vocabulary", RejectAt(Inconsistent, 12), true, |b| b[12] = 17),
        b("X46 base_window_0", RejectAt(OutOfRange, 8), true, |b| b[8] = 0),
        b("X47 base_window_max", RejectAt(OutOfRange, 8), true, |b| b[8..12].fill(0xff)),
        b("X48 base_windows_max", Reject(Truncated), true, |b| b[16..20].fill(0xff)),
        b("X49 base_windows_max_f32", Reject(Truncated), false, |b| b[20..24].fill(0xff)),
        b("X50 base_of_no_window", Reject(Inconsistent), true, |b| {
            b[16] = 0;
            b.truncate(20);
        }),
        b("X51 base_last_byte_missing", Reject(Truncated), true, |b| b.truncate(b.len() - 1)),
        b("X52 base_one_byte_more", Reject(Truncated), true, |b| b.push(0)),
        b("X53 base_token_outside", RejectAt(OutOfRange, 24), true, |b| b[24] = 16),
        b("X54 base_nan", RejectAt(NotFinite, ROWS.0), true, |b| b[ROWS.0 as usize..][..4].fill(0xff)),
        b("X55 base_nan_f32", RejectAt(NotFinite, ROWS.1), false, |b| b[ROWS.1 as usize..][..4].fill(0xff)),
        // The sign of the least log-probability, and its exponent.
        b("X56 base_positive", RejectAt(OutOfRange, ROWS.0), true, |b| b[ROWS.0 as usize + 7] ^= 0x80),
        b("X56 base_improbable", RejectAt(OutOfRange, ROWS.0), true, |b| b[ROWS.0 as usize + 7] ^= 0x02),
        b("X56 base_infinite", RejectAt(NotFinite, ROWS.0), true, |b| {
            b[ROWS.0 as usize..][..8].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0x80, 0xff]);
        }),
    ]
}

fn requests() -> Vec<Case> {
    use Kind::*;
    let r = |name: &str, expect, text: &'static [u8]| {
        folder_case("requests", name, expect, move |dir| {
            dir.file("good.gguf", &with_vocabulary().bytes());
            dir.file("case.jsonl", text)
        })
        .by(Action::Requests)
    };
    vec![
        r("valid_requests", Accept, b"{\"context\":\"ab\",\"continuation\":\"ab\"}\n{\"rolling\":\"aab\"}\n"),
        r("valid_requests_none", Accept, b""),
        r("X60 requests_not_json", RejectWith(BadJson, "line 2"), b"{\"rolling\":\"a\"}\nrolling"),
        r("X61 requests_blank_line", RejectWith(BadJson, "line 1"), b"\n{\"rolling\":\"a\"}\n"),
        r("X62 requests_array", Reject(WrongType), b"[\"a\",\"b\"]"),
        r("X63 requests_number", Reject(WrongType), b"{\"rolling\":1}"),
        r("X64 requests_half", Reject(WrongType), b"{\"context\":\"a\"}"),
        r(
            "X65 requests_both",
            Reject(WrongType),
            b"{\"context\":\"a\",\"continuation\":\"b\",\"rolling\":\"\"}",
        ),
        r(
            "X66 requests_of_nothing",
            RejectWith(Missing, "line 1"),
            b"{\"context\":\"a\",\"continuation\":\"\"}",
        ),
        r("X67 requests_not_utf8", RejectAt(WrongType, 12), b"{\"rolling\":\"\xff\"}"),
        r("X68 requests_nested", Reject(BadJson), &[b'['; 4096]),
    ]
}

fn differences() -> Vec<Case> {
    let d = |name: &str, expect, bytes: fn() -> Vec<u8>| {
        folder_case("diff", name, expect, move |dir| dir.file("case.gguf", &bytes())).by(Action::Diff)
    };
    vec![
        d("valid_diff", Accept, || with_vocabulary().bytes()),
        // Any GGUF file will do.
        d("valid_diff_of_a_matrix", Accept, || matrix().bytes()),
        d("X70 diff_cut", Reject(Kind::DataOutOfBounds), || cut(with_vocabulary(), 1)),
        folder_case("diff", "X71 diff_of_folders", Reject(Kind::NotRegularFile), |dir| dir.path().to_owned())
            .by(Action::Diff),
    ]
}
