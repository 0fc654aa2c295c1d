//! Good GGUF files: what we write is read back, byte for byte as gguf-py writes it, up to the limits.

use kestrel_formats::arch::{Arch, HyperParams};
use kestrel_formats::gguf::{
    ARCHITECTURE, Array, Gguf, KEY_ARCHITECTURE, TensorDecl, Value, architecture_metadata,
    hyperparams_from_gguf, layout, model_of,
};
use kestrel_formats::{ErrorKind, GgmlType, arch, limits};
use kestrel_tests::alloc_count::peak_during;
use kestrel_tests::gguf_builder::{GgufBuilder, Raw, RawTensor, model};
use kestrel_tests::temp_dir::TempDir;
use std::path::{Path, PathBuf};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/gguf").join(name)
}

/// A file of this content, the data of all tensors made by `byte(tensor, position)`.
fn write(pairs: &[(String, Value)], tensors: &[TensorDecl], byte: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let layout = layout(pairs, tensors).expect("a valid layout");
    let mut out = layout.header;
    for (i, &(offset, n_bytes)) in layout.tensors.iter().enumerate() {
        out.resize(offset as usize, 0);
        out.extend((0..n_bytes as usize).map(|k| byte(i, k)));
    }
    out.resize(layout.file_bytes as usize, 0);
    out
}

/// What `scripts/oracle/gguf_roundtrip.py` puts into its file.
fn every_type_pairs() -> Vec<(String, Value)> {
    let strings = ["", "a", "Ġkestrel", "隼"].map(String::from).to_vec();
    let pairs: Vec<(&str, Value)> = vec![
        (KEY_ARCHITECTURE, ARCHITECTURE.into()),
        ("test.u8", u8::MAX.into()),
        ("test.i8", i8::MIN.into()),
        ("test.u16", u16::MAX.into()),
        ("test.i16", i16::MIN.into()),
        ("test.u32", u32::MAX.into()),
        ("test.i32", i32::MIN.into()),
        ("test.u64", u64::MAX.into()),
        ("test.i64", i64::MIN.into()),
        ("test.f32", 0.15625f32.into()),
        ("test.f64", (-1e300f64).into()),
        ("test.bool", true.into()),
        ("test.string", "Ein Turmfalke, 紅隼, 🦅".into()),
        ("test.empty", "".into()),
        ("test.u8s", vec![0u8, 1, u8::MAX].into()),
        ("test.i8s", vec![i8::MIN, 0, i8::MAX].into()),
        ("test.u16s", vec![0, u16::MAX].into()),
        ("test.i16s", vec![i16::MIN, i16::MAX].into()),
        ("test.u32s", vec![0, u32::MAX].into()),
        ("test.i32s", vec![i32::MIN, i32::MAX].into()),
        ("test.u64s", vec![0, u64::MAX].into()),
        ("test.i64s", vec![i64::MIN, i64::MAX].into()),
        ("test.f32s", vec![-0.5f32, 0.0, 65504.0].into()),
        ("test.f64s", vec![-0.5f64, 0.0, 1e-300].into()),
        ("test.bools", vec![true, false, true].into()),
        ("test.strings", strings.into()),
    ];
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

fn every_type_tensors() -> Vec<TensorDecl> {
    use GgmlType::*;
    let types = [F32, F16, Bf16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2K, Q3K, Q4K, Q5K, Q6K, Iq4Nl, Iq4Xs];
    let decl = |name, dtype, shape: &[u64]| TensorDecl { name, dtype, shape: shape.to_vec() };
    let mut out: Vec<_> =
        types.map(|t| decl(format!("{}.weight", t.name().to_lowercase()), t, &[2, 256])).into();
    let shapes: [&[u64]; 4] = [&[3], &[2, 3], &[2, 1, 3], &[1, 2, 1, 3]];
    out.extend(shapes.iter().map(|s| decl(format!("dims{}", s.len()), F32, s)));
    out
}

#[test]
fn gguf_pys_file_reads_as_written() {
    let file = Gguf::open(&data("every-type.gguf")).expect("the golden file opens");
    assert_eq!((file.version(), file.alignment(), file.warnings()), (3, 32, &[][..]));
    assert_eq!(file.metadata().to_pairs(), every_type_pairs());
    let expected = every_type_tensors();
    assert_eq!(file.tensors().len(), expected.len());
    for (got, decl) in file.tensors().iter().zip(&expected) {
        assert_eq!((&got.name, got.dtype, &got.shape), (&decl.name, decl.dtype, &decl.shape));
        let view = file.tensor(&decl.name).expect("found by name");
        assert!(view.bytes.iter().enumerate().all(|(i, &b)| b == i as u8), "{}", decl.name);
    }
}

#[test]
fn our_layout_equals_gguf_pys() {
    let golden = std::fs::read(data("every-type.gguf")).expect("the golden file");
    let ours = write(&every_type_pairs(), &every_type_tensors(), |_, k| k as u8);
    let first = ours.iter().zip(&golden).position(|(a, b)| a != b);
    assert_eq!((first, ours.len()), (None, golden.len()), "first difference, length");
}

#[test]
fn gguf_pys_split_file_reads_as_one() {
    let file = Gguf::open(&data("split-00001-of-00003.gguf")).expect("the golden file opens");
    let parts: Vec<_> = file.tensors().iter().map(|t| (t.name.as_str(), t.part)).collect();
    assert_eq!(parts, [("t0", 0), ("t1", 0), ("t2", 1), ("t3", 1), ("t4", 2)]);
    for (i, t) in file.tensors().iter().enumerate() {
        let bytes = file.tensor(&t.name).expect("found by name").bytes;
        assert!(
            bytes.len() == 24 && bytes.chunks_exact(4).all(|b| b == (i as f32).to_le_bytes()),
            "{}",
            t.name
        );
    }
    let sizes =
        (1..=3).map(|i| std::fs::metadata(data(&format!("split-0000{i}-of-00003.gguf"))).unwrap().len());
    assert_eq!(file.file_bytes(), sizes.sum::<u64>());
}

#[test]
fn files_of_llama_cpps_quantizer_are_models() {
    for i in 1..=4 {
        let file =
            Gguf::open(&data(&format!("../llama_cpp/mixed-{i}.gguf"))).expect("llama.cpp's file opens");
        let model = model_of(&file).expect("a model");
        assert_eq!((model.hparams.arch, model.tied), (Arch::FalconMamba, false));
        assert_eq!((file.warnings(), &model.warnings[..]), (&[][..], &[][..]), "mixed-{i}");
    }
}

#[test]
fn getters_give_the_value_or_name_key_and_offset() {
    let file = Gguf::open(&data("every-type.gguf")).expect("the golden file opens");
    let m = file.metadata();
    assert_eq!(m.u64("test.u8").unwrap(), Some(255));
    assert_eq!(m.u32("test.u64").unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(m.i32("test.i8").unwrap(), Some(-128));
    assert_eq!(m.u64("test.i8").unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(m.f32("test.f32").unwrap(), Some(0.15625));
    assert_eq!(m.f32("test.f64").unwrap_err().kind(), ErrorKind::WrongType);
    assert_eq!(m.bool("test.bool").unwrap(), Some(true));
    assert_eq!(m.str("test.empty").unwrap(), Some(""));
    assert_eq!(m.i32s("test.i32s").unwrap(), Some(vec![i32::MIN, i32::MAX]));
    assert_eq!(m.u32s("test.u32s").unwrap(), Some(vec![0, u32::MAX]));
    assert_eq!(m.f32s("test.f32s").unwrap(), Some(vec![-0.5, 0.0, 65504.0]));
    // The bytes of another element type are never read as these (G75, G76).
    for key in ["test.u8s", "test.u32s", "test.i32", "test.strings"] {
        assert_eq!(m.i32s(key).unwrap_err().kind(), ErrorKind::WrongType, "{key}");
    }
    assert_eq!(m.u64("absent").unwrap(), None);
    assert!(m.strings("absent").unwrap().is_none() && !m.contains("absent") && m.contains("test.f64s"));

    let strings = m.strings("test.strings").unwrap().expect("there");
    let expected = ["", "a", "Ġkestrel", "隼"].map(str::as_bytes);
    assert_eq!(strings.iter().collect::<Vec<_>>(), expected);
    assert_eq!((0..strings.len()).filter_map(|i| strings.get(i)).collect::<Vec<_>>(), expected);
    assert_eq!((strings.get(4), strings.get(usize::MAX)), (None, None));

    let error = m.u32("test.string").unwrap_err();
    let details = error.details();
    let offset = details.offset.expect("an offset") as usize;
    assert!(
        std::fs::read(data("every-type.gguf")).unwrap()[offset..].starts_with("Ein Turmfalke".as_bytes())
    );
    assert_eq!(details.what.as_deref(), Some("key \"test.string\""));
    assert_eq!(m.field("test.u8s").expect("there").head(2), Value::Array(Array::U8(vec![0, 1])));
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn text(&mut self) -> String {
        let letters: Vec<char> = "abc.xyz Ġ隼🦅\n".chars().collect();
        (0..self.below(20)).map(|_| letters[self.below(letters.len() as u64) as usize]).collect()
    }

    /// Numbers are whole, so that they compare equal to themselves.
    fn value(&mut self) -> Value {
        let n = self.below(9);
        macro_rules! number {
            ($type:ty, $is_array:expr) => {
                match $is_array {
                    true => (0..n).map(|_| self.next() as $type).collect::<Vec<$type>>().into(),
                    false => (self.next() as $type).into(),
                }
            };
        }
        let is_array = self.below(2) == 1;
        match self.below(12) {
            0 => number!(u8, is_array),
            1 => number!(i8, is_array),
            2 => number!(u16, is_array),
            3 => number!(i16, is_array),
            4 => number!(u32, is_array),
            5 => number!(i32, is_array),
            6 => number!(u64, is_array),
            7 => number!(i64, is_array),
            8 => number!(f32, is_array),
            9 => number!(f64, is_array),
            10 if is_array => (0..n).map(|_| self.below(2) == 1).collect::<Vec<_>>().into(),
            10 => (self.below(2) == 1).into(),
            // Tokens need not be UTF-8.
            11 if is_array => (0..n).map(|_| self.next().to_le_bytes().to_vec()).collect::<Vec<_>>().into(),
            _ => self.text().into(),
        }
    }

    fn tensor(&mut self, i: usize) -> TensorDecl {
        let types: Vec<_> = GgmlType::all().collect();
        let dtype = types[self.below(types.len() as u64) as usize];
        let n_dims = 1 + self.below(4);
        let mut shape: Vec<u64> = (0..n_dims).map(|_| self.below(4)).collect();
        let last = shape.len() - 1;
        shape[last] *= dtype.block_len() as u64;
        TensorDecl { name: format!("tensor {i} {}", dtype.name()), dtype, shape }
    }
}

#[test]
fn random_files_read_back_as_laid_out() {
    let mut random = Random(1);
    let dir = TempDir::new();
    for round in 0..200 {
        let pairs: Vec<_> =
            (0..random.below(40)).map(|i| (format!("key.{i}.{}", random.text()), random.value())).collect();
        let tensors: Vec<_> = (0..random.below(40) as usize).map(|i| random.tensor(i)).collect();
        let bytes = write(&pairs, &tensors, |t, k| (t * 31 + k) as u8);
        let path = dir.file(&format!("{round}.gguf"), &bytes);
        let file = Gguf::open(&path).unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert_eq!(file.metadata().to_pairs(), pairs, "round {round}");
        assert_eq!(file.warnings(), &[] as &[String], "round {round}");
        assert_eq!(file.tensors().len(), tensors.len(), "round {round}");
        for (i, (got, decl)) in file.tensors().iter().zip(&tensors).enumerate() {
            assert_eq!((&got.name, got.dtype, &got.shape), (&decl.name, decl.dtype, &decl.shape));
            let view = file.tensor(&decl.name).expect("found by name");
            let elements: u64 = decl.shape.iter().product();
            assert_eq!(Some(view.bytes.len() as u64), decl.dtype.bytes_for(elements));
            assert!(
                view.bytes.iter().enumerate().all(|(k, &b)| b == (i * 31 + k) as u8),
                "round {round}, tensor {i}"
            );
        }
    }
}

#[test]
fn every_truncation_and_thousands_of_mutations_end_in_a_result() {
    let bytes = std::fs::read(data("every-type.gguf")).expect("the golden file");
    let dir = TempDir::new();
    let read = |bytes: &[u8], name: &str| {
        let path = dir.file(name, bytes);
        let (out, peak) = peak_during(|| Gguf::open(&path).and_then(|f| hyperparams_from_gguf(&f)));
        assert!(peak <= (1 << 20) + 2 * bytes.len(), "{name} took {peak} bytes");
        std::fs::remove_file(path).expect("removing the file");
        out
    };
    let header = 2560;
    for n in (0..header).chain((header..bytes.len()).step_by(97)) {
        let path = dir.file("cut", &bytes[..n]);
        assert!(Gguf::open(&path).is_err(), "cut to {n} bytes");
        std::fs::remove_file(path).expect("removing the file");
    }
    let mut random = Random(2);
    for round in 0..5000 {
        let mut broken = bytes.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(header as u64) as usize;
            broken[at] = match random.below(3) {
                0 => random.next() as u8,
                1 => 0xff,
                _ => broken[at] ^ (1 << random.below(8)),
            };
        }
        // No panic and no large allocation; that it makes no model is certain.
        read(&broken, &format!("mutation-{round}")).expect_err("no model");
    }
}

#[test]
fn version_2_reads_like_version_3() {
    let dir = TempDir::new();
    let file = GgufBuilder::default().kv("k", Raw::str(b"v")).tensor(RawTensor::f32("t", &[5, 2]));
    let v3 = Gguf::open(&dir.file("v3.gguf", &file.bytes())).expect("version 3");
    let v2 =
        Gguf::open(&dir.file("v2.gguf", &GgufBuilder { version: 2, ..file }.bytes())).expect("version 2");
    assert_eq!((v2.version(), v3.version()), (2, 3));
    assert_eq!(v2.metadata().to_pairs(), v3.metadata().to_pairs());
    assert_eq!(v2.tensors(), v3.tensors());
    assert_eq!(v2.tensor("t").map(|t| t.bytes.to_vec()), v3.tensor("t").map(|t| t.bytes.to_vec()));
}

#[test]
fn a_model_round_trips_through_its_metadata() {
    let h = HyperParams {
        arch: Arch::FalconMamba,
        d_model: 8,
        d_inner: 16,
        d_state: 2,
        d_conv: 4,
        dt_rank: 3,
        n_layer: 3,
        vocab_size: 24,
        layer_norm_epsilon: 1e-5,
        mixer_rms_eps: 1e-5,
    };
    let dir = TempDir::new();
    for (h, tied) in [(h, false), (HyperParams { arch: Arch::Mamba, ..h }, true)] {
        let mut pairs = vec![(KEY_ARCHITECTURE.to_owned(), Value::from(ARCHITECTURE))];
        pairs.extend(architecture_metadata(&h));
        let tensors: Vec<_> = arch::tensors(&h, tied)
            .into_iter()
            .map(|(spec, layer)| TensorDecl {
                name: spec.gguf_name(layer),
                dtype: GgmlType::F32,
                shape: (spec.shape)(&h).iter().map(|&d| d as u64).collect(),
            })
            .collect();
        let path = dir.file(&format!("tied-{tied}.gguf"), &write(&pairs, &tensors, |_, _| 0));
        let file = Gguf::open(&path).expect("our file opens");
        assert_eq!(hyperparams_from_gguf(&file).expect("a model"), (h, tied));
        // Types as llama.cpp's loader asks for them.
        assert_eq!(
            file.metadata().field("mamba.context_length").map(|f| f.value()),
            Some(Value::U32(1 << 20))
        );
        assert_eq!(
            file.metadata().field("mamba.attention.head_count").map(|f| f.value()),
            Some(Value::U32(0))
        );
        assert_eq!(
            file.metadata().field("mamba.feed_forward_length").map(|f| f.value()),
            Some(Value::U32(0))
        );
        let is_falcon = Value::Bool(h.arch == Arch::FalconMamba);
        assert_eq!(file.metadata().field("mamba.ssm.dt_b_c_rms").map(|f| f.value()), Some(is_falcon));
    }
    // Weights in a GGUF carry the eps scale, so the second eps does not survive.
    let bytes = model(&HyperParams { mixer_rms_eps: 1e-6, ..h }).bytes();
    let file = Gguf::open(&dir.file("eps.gguf", &bytes)).expect("a file");
    assert_eq!(hyperparams_from_gguf(&file).expect("a model").0.mixer_rms_eps, 1e-5);
}

#[test]
fn layouts_that_no_reader_accepts_are_refused() {
    let pair = |key: &str| (key.to_owned(), Value::U32(1));
    let tensor = |name: &str, shape: &[u64]| TensorDecl {
        name: name.to_owned(),
        dtype: GgmlType::Q4_0,
        shape: shape.to_vec(),
    };
    let kind = |pairs: &[(String, Value)], tensors: &[TensorDecl]| layout(pairs, tensors).unwrap_err().kind();
    assert_eq!(kind(&[pair("")], &[]), ErrorKind::BadName);
    assert_eq!(kind(&[pair("a\0")], &[]), ErrorKind::BadName);
    assert_eq!(kind(&[pair("a"), pair("a")], &[]), ErrorKind::Duplicate);
    assert_eq!(kind(&[pair("general.alignment")], &[]), ErrorKind::BadAlignment);
    assert_eq!(kind(&[], &[tensor(&"n".repeat(64), &[32])]), ErrorKind::BadName);
    assert_eq!(kind(&[], &[tensor("a", &[32]), tensor("a", &[32])]), ErrorKind::Duplicate);
    assert_eq!(kind(&[], &[tensor("a", &[33])]), ErrorKind::BadShape);
    assert_eq!(kind(&[], &[tensor("a", &[])]), ErrorKind::BadShape);
    assert_eq!(kind(&[], &[tensor("a", &[1, 1, 1, 1, 32])]), ErrorKind::BadShape);
    assert_eq!(kind(&[], &[tensor("a", &[1 << 40, 1 << 40])]), ErrorKind::BadShape);
    // Each fits in 63 bits; eight do not in 64.
    let large: Vec<_> = (0..8).map(|i| tensor(&i.to_string(), &[1 << 30, 1 << 32])).collect();
    assert!(layout(&[], &large[..7]).is_ok());
    assert_eq!(kind(&[], &large), ErrorKind::Limit);
}

/// One file at a limit and one beyond it.
fn at_and_beyond(name: &str, file: impl Fn(u64) -> GgufBuilder, limit: u64, beyond: ErrorKind) {
    let dir = TempDir::new();
    let open = |n| {
        let bytes = file(n).bytes();
        let path = dir.file(&format!("{n}.gguf"), &bytes);
        let (out, peak) = peak_during(|| Gguf::open(&path).map(|f| f.warnings().to_vec()));
        assert!(
            peak <= (1 << 20) + 2 * bytes.len(),
            "{name} {n}: {peak} bytes for a file of {}",
            bytes.len()
        );
        out
    };
    assert_eq!(open(limit).unwrap_or_else(|e| panic!("{name}: {e}")), [] as [String; 0], "{name}");
    assert_eq!(open(limit + 1).expect_err(name).kind(), beyond, "{name}");
}

#[test]
fn counts_and_lengths_up_to_their_limits() {
    let empty = GgufBuilder::default;
    at_and_beyond(
        "keys",
        |n| (0..n).fold(empty(), |f, i| f.kv(&format!("{i:x}"), Raw::bool(1))),
        limits::GGUF_KV_MAX,
        ErrorKind::Limit,
    );
    // G101: 65,536 tensors with names that differ late, no metadata.
    at_and_beyond(
        "tensors",
        |n| (0..n).fold(empty(), |f, i| f.tensor(RawTensor::f32(&format!("a.long.common.prefix.{i}"), &[1]))),
        limits::TENSORS_MAX,
        ErrorKind::Limit,
    );
    at_and_beyond(
        "key bytes",
        |n| empty().kv(&"k".repeat(n as usize), Raw::bool(1)),
        limits::GGUF_KEY_BYTES_MAX,
        ErrorKind::BadName,
    );
    at_and_beyond(
        "string bytes",
        |n| empty().kv("k", Raw::str(&vec![b'x'; n as usize])),
        limits::GGUF_STRING_BYTES_MAX,
        ErrorKind::Limit,
    );
    let aligned = |alignment: u64| {
        let file = GgufBuilder { alignment: alignment.next_power_of_two(), ..empty() };
        file.kv("general.alignment", Raw::u32(alignment as u32)).tensor(RawTensor::f32("t", &[3]))
    };
    at_and_beyond("alignment", aligned, limits::GGUF_ALIGNMENT_MAX.into(), ErrorKind::BadAlignment);
}

#[test]
fn the_header_may_have_256_mib_and_no_more() {
    let dir = TempDir::new();
    for (extra, expected) in [(0, None), (1, Some(ErrorKind::Limit))] {
        // magic to value: 24 + 9 + 4, then the array's element type and length.
        let n = limits::GGUF_METADATA_BYTES_MAX - 24 - 9 - 4 - 12 + extra;
        let path = dir.file("big.gguf", &GgufBuilder::default().kv("k", Raw::array(0, n, b"")).header());
        let file = std::fs::File::options().write(true).open(&path).expect("opening the file");
        file.set_len(limits::GGUF_METADATA_BYTES_MAX + extra).expect("a sparse file");
        assert_eq!(Gguf::open(&path).err().map(|e| e.kind()), expected);
        std::fs::remove_file(path).expect("removing the file");
    }
}
