//! The handcrafted files of llama.cpp's own test.

use super::*;

/// The files of llama.cpp's `tests/test-gguf.cpp` under its names: 27 to reject, 7 to accept. There the files of the
/// TENSORS group end after the header; here they have their data.
pub(super) fn cases() -> Vec<Case> {
    let parts = [header_and_pairs(), tensors(), data()];
    parts.into_iter().flatten().map(|c| c.group("llama.cpp")).collect()
}

fn header_and_pairs() -> Vec<Case> {
    let version = |version| GgufBuilder { version, ..empty() };
    vec![
        case("HEADER_BAD_MAGIC", GgufBuilder { magic: *b"FUGG", ..empty() }, RejectAt(Kind::BadMagic, 0)),
        case("HEADER_BAD_VERSION_0", version(0), RejectAt(Kind::UnsupportedVersion, 4)),
        case("HEADER_BAD_VERSION_1", version(1), RejectAt(Kind::UnsupportedVersion, 4)),
        case("HEADER_BAD_VERSION_FUTURE", version(4), RejectAt(Kind::UnsupportedVersion, 4)),
        case(
            "HEADER_BAD_N_KV",
            GgufBuilder { n_kv: Some(u64::MAX), ..empty() },
            RejectAt(Kind::CountExceedsFile, 16),
        ),
        case(
            "HEADER_BAD_N_TENSORS",
            GgufBuilder { n_tensors: Some(u64::MAX), ..empty() },
            RejectAt(Kind::CountExceedsFile, 8),
        ),
        case("HEADER_EMPTY", empty(), Accept),
        case(
            "KV_BAD_KEY_SIZE",
            [&small().bytes()[..KEY as usize], &[0xff; 8], &small().bytes()[KEY as usize + 8..]].concat(),
            RejectAt(Kind::CountExceedsFile, KEY),
        ),
        case("KV_EMPTY_KEY", empty().kv("", Raw::u32(7)), RejectAt(Kind::BadName, KEY)),
        case("KV_BAD_TYPE", empty().kv("k", Raw::new(13, &[0; 8])), RejectAt(Kind::UnknownType, KEY_TYPE)),
        case(
            "KV_DUPLICATE_KEY",
            empty().kv("k", Raw::u32(7)).kv("k", Raw::u32(8)),
            RejectAt(Kind::Duplicate, VALUE + 4),
        ),
        case("KV_BAD_ALIGN", empty().kv("general.alignment", Raw::u32(13)), RejectAt(Kind::BadAlignment, 53)),
        case(
            "KV_WRONG_TYPE_ALIGN",
            empty().kv("general.alignment", Raw::i32(32)),
            RejectAt(Kind::WrongType, 53),
        ),
        case("KV_SUCCESS", every_value_type(), Accept),
    ]
}

fn every_value_type() -> GgufBuilder {
    let sizes = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
    let mut file = empty();
    for (ty, &n) in (0u32..).zip(&sizes).filter(|&(_, &n)| n > 0) {
        file = file.kv(&format!("scalar.{ty}"), Raw::new(ty, &vec![1; n]));
        file = file.kv(&format!("array.{ty}"), Raw::array(ty, 3, &vec![1; 3 * n]));
    }
    let strings = [Raw::str(b"").bytes, Raw::str(b"\xff\xfe").bytes, Raw::str(b"falcon").bytes].concat();
    file.kv("scalar.8", Raw::str("Ġ".as_bytes())).kv("array.8", Raw::array(8, 3, &strings))
}

fn tensors() -> Vec<Case> {
    let f32_claiming = |ne: &[u64], n_bytes| with_tensor(RawTensor::without_data("b", ne, 0, n_bytes));
    let t = || RawTensor::f32("b", &[8]);
    vec![
        case(
            "TENSORS_BAD_NAME_SIZE",
            with_tensor(RawTensor::f32(&"n".repeat(64), &[8])),
            Reject(Kind::BadName),
        ),
        case("TENSORS_BAD_N_DIMS", with_tensor(RawTensor { n_dims: Some(5), ..t() }), Reject(Kind::BadShape)),
        case("TENSORS_BAD_SHAPE", f32_claiming(&[u64::MAX], 32), Reject(Kind::BadShape)),
        case(
            "TENSORS_ZERO_DIM",
            with_tensor(RawTensor::f32("b", &[8, 0])).tensor(RawTensor::f32("c", &[8])),
            Accept,
        ),
        case("TENSORS_NE_TOO_BIG", f32_claiming(&[1 << 32, 1 << 32], 0), Reject(Kind::BadShape)),
        case("TENSORS_NBYTES_TOO_BIG", f32_claiming(&[1 << 31, 1 << 31], 0), Reject(Kind::BadShape)),
        case("TENSORS_NBYTES_PAD_WRAP", f32_claiming(&[(1 << 62) - 1], 0), Reject(Kind::BadShape)),
        case("TENSORS_BAD_TYPE", with_tensor(RawTensor { ty: 43, ..t() }), Reject(Kind::UnknownType)),
        case(
            "TENSORS_BAD_OFFSET",
            with_tensor(RawTensor { offset: Some(u64::MAX), ..t() }),
            Reject(Kind::BadOffset),
        ),
        case("TENSORS_DUPLICATE_NAME", with_tensor(RawTensor::f32("a", &[8])), Reject(Kind::Duplicate)),
        case("TENSORS_BAD_ALIGN", small().kv("general.alignment", Raw::u32(13)), Reject(Kind::BadAlignment)),
        case("TENSORS_INCONSISTENT_ALIGN", inconsistent_alignment(), Reject(Kind::BadOffset)),
        case("TENSORS_SUCCESS", small(), Accept),
        case("TENSORS_CUSTOM_ALIGN", aligned(1), Accept),
    ]
}

/// Says 32 where offsets follow an alignment of 1.
fn inconsistent_alignment() -> GgufBuilder {
    aligned(1).set("general.alignment", Raw::u32(32))
}

fn data() -> Vec<Case> {
    let quarter = |name| RawTensor::without_data(name, &[1 << 60], 0, 1 << 62);
    let mem_size_overflow =
        empty().tensor(quarter("a")).tensor(quarter("b")).tensor(quarter("c")).tensor(quarter("d"));
    vec![
        case("DATA_NOT_ENOUGH_DATA", cut(small(), 1), Reject(Kind::DataOutOfBounds)),
        case("DATA_BAD_ALIGN", small().kv("general.alignment", Raw::u32(13)), Reject(Kind::BadAlignment)),
        case("DATA_INCONSISTENT_ALIGN", inconsistent_alignment(), Reject(Kind::BadOffset)),
        case("DATA_MEM_SIZE_OVERFLOW", mem_size_overflow, Reject(Kind::DataOutOfBounds)),
        case("DATA_SUCCESS", small(), Accept),
        case("DATA_CUSTOM_ALIGN", aligned(256), Accept),
    ]
}
