//! Containers: headers, metadata, tensor entries, data.

use super::*;

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = container_cases();
    cases.extend(tensor_cases());
    // Made when they are needed: Miri makes this part of the table, too.
    cases.push(
        folder_case("container", "G101 tensors_65536", Reject(Kind::Missing), |dir| {
            dir.file("case.gguf", &tensors_65536().bytes())
        })
        .by(Action::Tokenize),
    );
    cases.push(folder_case("container", "G51 trailing_1mib_zip", Warn("1048580 bytes follow"), |dir| {
        dir.file("case.gguf", &[small().bytes(), b"PK\x03\x04".to_vec(), vec![0; 1 << 20]].concat())
    }));
    cases
}

/// As many tensors as may be, none of which has data. The container is sound, but nothing is in it.
fn tensors_65536() -> GgufBuilder {
    let tensor = |i| RawTensor::without_data(&format!("tensor.{i:056}"), &[0], 0, 0);
    GgufBuilder { tensors: (0..65_536).map(tensor).collect(), ..empty() }
}

/// Headers and metadata.
fn container_cases() -> Vec<Case> {
    let lies = |n_tensors, n_kv| GgufBuilder { n_tensors, n_kv, ..small() };
    let one = |value| empty().kv("k", value);
    let nested =
        |depth| Raw::new(9, &[&[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0].repeat(depth)[..], &[0; 12]].concat());
    let in_kv = one(Raw::str(b"a long enough text")).header().len() - 9;
    vec![
        case("G01 empty_file", "", RejectAt(Kind::Truncated, 0)),
        case("G02 3_bytes", "GGU", RejectAt(Kind::Truncated, 0)),
        case("G03 bad_magic", GgufBuilder { magic: *b"ggml", ..small() }, RejectAt(Kind::BadMagic, 0)),
        case(
            "G03 lfs_pointer",
            "version https://git-lfs.github.com/spec/v1\n",
            RejectAt(Kind::LfsPointer, 0),
        ),
        case("G04 version_0", GgufBuilder { version: 0, ..small() }, RejectAt(Kind::UnsupportedVersion, 4)),
        case("G05 version_1", GgufBuilder { version: 1, ..small() }, RejectAt(Kind::UnsupportedVersion, 4)),
        case("G06 version_4", GgufBuilder { version: 4, ..small() }, RejectAt(Kind::UnsupportedVersion, 4)),
        case(
            "G07 version_byteswapped",
            GgufBuilder { version: 3 << 24, ..small() },
            RejectAt(Kind::BigEndian, 4),
        ),
        case("G08 n_tensors_max", lies(Some(u64::MAX), None), RejectAt(Kind::CountExceedsFile, 8)),
        case("G09 n_kv_max", lies(None, Some(u64::MAX)), RejectAt(Kind::CountExceedsFile, 16)),
        case("G10 n_kv_2p40", lies(None, Some(1 << 40)), RejectAt(Kind::CountExceedsFile, 16)),
        // The next key reads as a tensor's name and its type, 6 for f32, as the number of dimensions.
        case(
            "G11 n_kv_less_than_actual",
            GgufBuilder { n_kv: Some(1), ..small() }.kv("x", Raw::f32(1.0)),
            RejectAt(Kind::BadShape, VALUE + 4 + 9),
        ),
        case(
            "G12 trunc_in_kv",
            &one(Raw::str(b"a long enough text")).header()[..in_kv],
            Reject(Kind::CountExceedsFile),
        ),
        case(
            "G12 trunc_in_kv_type",
            [&small().bytes()[..KEY_TYPE as usize], &[0; 2]].concat(),
            Reject(Kind::CountExceedsFile),
        ),
        case(
            "G13 trunc_in_tensor_info",
            &small().header()[..small().header().len() - 5],
            Reject(Kind::Truncated),
        ),
        case("G14 trunc_last_byte", cut(small(), 1), Reject(Kind::DataOutOfBounds)),
        case("G15 trunc_half_data", cut(small(), 50), Reject(Kind::DataOutOfBounds)),
        case("G16 header_only", small().header(), Reject(Kind::DataOutOfBounds)),
        case("G17 empty_key", one(Raw::u32(1)).kv("", Raw::u32(7)), RejectAt(Kind::BadName, VALUE + 4)),
        case("G18 dup_key", one(Raw::u32(7)).kv("k", Raw::f32(7.0)), RejectAt(Kind::Duplicate, VALUE + 4)),
        case("G19 kv_type_13", one(Raw::new(13, &[0; 8])), RejectAt(Kind::UnknownType, KEY_TYPE)),
        case("G20 key_not_utf8", empty().kv_bytes(b"\xff\xfe", Raw::u32(7)), RejectAt(Kind::BadName, KEY)),
        case("G21 key_with_nul", empty().kv_bytes(b"a\0b", Raw::u32(7)), RejectAt(Kind::BadName, KEY)),
        case(
            "G22 string_len_1gib",
            one(Raw::str_of_len(1 << 30, b"x")),
            RejectAt(Kind::CountExceedsFile, VALUE),
        ),
        case(
            "G23 string_len_max",
            one(Raw::str_of_len(u64::MAX, b"x")),
            RejectAt(Kind::CountExceedsFile, VALUE),
        ),
        case(
            "G24 array_len_1g_u8",
            one(Raw::array(0, 1 << 30, &[0; 9])),
            RejectAt(Kind::CountExceedsFile, VALUE + 4),
        ),
        case(
            "G24 array_len_times_8_wraps",
            one(Raw::array(10, 1 << 61, &[0; 8])),
            RejectAt(Kind::CountExceedsFile, VALUE + 4),
        ),
        case(
            "G24 string_array_len_1g",
            one(Raw::array(8, 1 << 30, &[0; 80])),
            RejectAt(Kind::CountExceedsFile, VALUE + 4),
        ),
        case(
            "G24 string_array_element_len_max",
            one(Raw::array(8, 1, &[0xff; 8])),
            RejectAt(Kind::CountExceedsFile, VALUE + 12),
        ),
        case("G25 array_of_array", one(nested(1)), RejectAt(Kind::Unsupported, VALUE)),
        case("G26 nested_5000", one(nested(5000)), RejectAt(Kind::Unsupported, VALUE)),
        case("G27 bool_2", one(Raw::bool(2)), RejectAt(Kind::OutOfRange, VALUE)),
        case(
            "G27 bool_2_in_array",
            one(Raw::array(7, 3, &[0, 1, 2])),
            RejectAt(Kind::OutOfRange, VALUE + 14),
        ),
        case("G27 string_not_utf8", one(Raw::str(b"\xff")), RejectAt(Kind::OutOfRange, VALUE + 8)),
        case("G28 align_0", small().kv("general.alignment", Raw::u32(0)), Reject(Kind::BadAlignment)),
        case("G29 align_13", small().kv("general.alignment", Raw::u32(13)), Reject(Kind::BadAlignment)),
        case("G30 align_i32", small().kv("general.alignment", Raw::i32(32)), Reject(Kind::WrongType)),
        case(
            "G31 align_2p31",
            small().kv("general.alignment", Raw::u32(1 << 31)),
            Reject(Kind::BadAlignment),
        ),
        case(
            "G31 align_2p21",
            small().kv("general.alignment", Raw::u32(1 << 21)),
            Reject(Kind::BadAlignment),
        ),
        case("G32 align_1", aligned(1), Accept),
        case(
            "G102 padding_not_zero",
            GgufBuilder { padding_byte: 7, ..aligned(32) }.tensor(RawTensor::f32("c", &[1])),
            Warn("padding bytes are not zero"),
        ),
        case(
            "G102 last_padding_missing",
            cut(aligned(32), 12),
            Warn("the last 12 padding bytes are missing"),
        ),
    ]
}

/// Tensor entries.
fn tensor_cases() -> Vec<Case> {
    let t = || RawTensor::f32("b", &[8]);
    let ne = |ne: &[u64]| with_tensor(RawTensor::without_data("b", ne, 0, 32));
    let of_type = |ty| with_tensor(RawTensor { ty, ..RawTensor::f32("b", &[256]) });
    let at_offset = |offset| with_tensor(RawTensor { offset: Some(offset), ..t() });
    // Fields of the second entry: the first takes 33 bytes, the second's name another 9.
    let (n_dims, offset) = (24 + 33 + 9, 24 + 33 + 9 + 4 + 8 + 4);
    let mut cases = vec![
        case("G33 dup_tensor", with_tensor(RawTensor::f32("a", &[4])), Reject(Kind::Duplicate)),
        case("G34 name_empty", with_tensor(RawTensor::f32("", &[8])), RejectAt(Kind::BadName, 24 + 33)),
        case(
            "G34 name_not_utf8",
            with_tensor(RawTensor { name: vec![0xff], ..t() }),
            RejectAt(Kind::BadName, 24 + 33),
        ),
        case("G34 name_with_nul", with_tensor(RawTensor::f32("a\0", &[8])), RejectAt(Kind::BadName, 24 + 33)),
        case("G35 name_63", with_tensor(RawTensor::f32(&"n".repeat(63), &[8])), Accept),
        case(
            "G35 name_64",
            with_tensor(RawTensor::f32(&"n".repeat(64), &[8])),
            RejectAt(Kind::BadName, 24 + 33),
        ),
        case(
            "G36 n_dims_0",
            with_tensor(RawTensor { n_dims: Some(0), ..t() }),
            RejectAt(Kind::BadShape, n_dims),
        ),
        case(
            "G36 n_dims_0_scalar",
            with_tensor(RawTensor::without_data("b", &[], 0, 0)),
            RejectAt(Kind::BadShape, n_dims),
        ),
        case("G37 n_dims_4", with_tensor(RawTensor::f32("b", &[2, 2, 2, 1])), Accept),
        case(
            "G37 n_dims_5",
            with_tensor(RawTensor::f32("b", &[2, 2, 2, 1, 1])),
            RejectAt(Kind::BadShape, n_dims),
        ),
        case(
            "G38 n_dims_max",
            with_tensor(RawTensor { n_dims: Some(u32::MAX), ..t() }),
            RejectAt(Kind::BadShape, n_dims),
        ),
        case("G39 ne_negative", ne(&[u64::MAX]), RejectAt(Kind::BadShape, n_dims)),
        case("G39 ne_negative_and_0", ne(&[u64::MAX, 0]), RejectAt(Kind::BadShape, n_dims)),
        case("G40 ne_zero", with_tensor(RawTensor::f32("b", &[0])), Accept),
        case("G41 ne_product_overflow", ne(&[1 << 32, 1 << 32]), RejectAt(Kind::BadShape, n_dims)),
        case(
            "G41 ne_product_overflow_hidden_by_0",
            ne(&[1 << 32, 0, 1 << 32]),
            RejectAt(Kind::BadShape, n_dims),
        ),
        case("G42 nbytes_pad_wrap", ne(&[(1 << 62) - 1]), RejectAt(Kind::BadShape, n_dims)),
        case("G42 nbytes_2p60", ne(&[1 << 58]), Reject(Kind::DataOutOfBounds)),
        case("G43 type_999", of_type(999), RejectAt(Kind::UnknownType, offset - 4)),
        case("G44 type_neg", of_type(u32::MAX), RejectAt(Kind::UnknownType, offset - 4)),
        case("G45 type_removed_q4_2", of_type(4), RejectAt(Kind::RemovedType, offset - 4)),
        case(
            "G46 block_misfit",
            with_tensor(RawTensor::without_data("b", &[33], 2, 18)),
            RejectAt(Kind::BadShape, n_dims),
        ),
        case(
            "G46 k_block_misfit",
            with_tensor(RawTensor::without_data("b", &[128, 2], 12, 144)),
            RejectAt(Kind::BadShape, n_dims),
        ),
        case("G47 offset_misaligned", at_offset(33), RejectAt(Kind::BadOffset, offset)),
        case("G48 overlap", at_offset(0), RejectAt(Kind::BadOffset, offset)),
        case("G49 gap", at_offset(64), RejectAt(Kind::BadOffset, offset)),
        case("G50 offset_max", at_offset(u64::MAX), RejectAt(Kind::BadOffset, offset)),
        case("G50 offset_max_aligned", at_offset(u64::MAX - 31), RejectAt(Kind::BadOffset, offset)),
    ];
    let [removed, unsupported] =
        [&[5, 31, 32, 33, 36, 37, 38][..], &[9, 15, 16, 22, 24, 28, 29, 34, 39, 40, 42]];
    for (name, types, kind) in [
        ("G45 type_removed", removed, Kind::RemovedType),
        ("G43 type_unsupported", unsupported, Kind::Unsupported),
    ] {
        let of = |&ty: &u32| case(format!("{name}_{ty}"), of_type(ty), RejectAt(kind, offset - 4));
        cases.extend(types.iter().map(of));
    }
    cases
}
