//! Saved states and importance matrices.

use super::weights::WIDE;
use super::*;
use crate::gguf_builder::{GgufBuilder, model};

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

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = states();
    cases.extend(matrices());
    cases
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
