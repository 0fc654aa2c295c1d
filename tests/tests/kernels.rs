//! Every kernel on every instruction set of this machine, against f64 references made here.
//!
//! `KESTREL_REQUIRE_ISA=avx2,avx512` (any of the names) makes the absence of one of them a failure.

#![allow(clippy::print_stdout)] // a test says where it ran

use kestrel_formats::arch::{Arch, HyperParams};
use kestrel_formats::{GgmlType, WeightType};
use kestrel_quant::codec;
use kestrel_quant::codec::scales::{Absmax, Scales};
use kestrel_quant::codec::{f16_at, q4_k};
use kestrel_runtime::State;
use kestrel_runtime::kernels::{
    ActKind, Acts, ByChannel, Compute, InProj, Isa, MatrixRef, Mixer, ScanWeights, Segment, Then, kernels,
};
use kestrel_runtime::state::StateShape;

/// Numbers from a seed: xorshift64*, uniform in -1..1.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// Runs `check` if the machine has `isa`; otherwise says so, and fails if it was required.
fn on(isa: Isa, check: impl Fn(Isa)) {
    let required = std::env::var("KESTREL_REQUIRE_ISA").unwrap_or_default();
    if isa.supported() {
        assert_eq!(kernels(isa).isa(), isa, "the table of another instruction set");
        check(isa);
        println!("ran on {}", isa.name());
    } else {
        assert!(!required.split(',').any(|name| name == isa.name()), "{} is required and absent", isa.name());
        println!("{} is absent", isa.name());
    }
}

/// One test per family and instruction set, so that each is named.
macro_rules! on_every_isa {
    ($($check:ident),+) => { $(mod $check {
        use super::{Isa, on};
        #[test]
        fn scalar() { on(Isa::Scalar, super::$check); }
        #[test]
        fn scalar_int8() { on(Isa::ScalarInt8, super::$check); }
        #[test]
        fn avx2() { on(Isa::Avx2, super::$check); }
        #[test]
        fn avx512() { on(Isa::Avx512, super::$check); }
        #[test]
        fn amx() { on(Isa::Amx, super::$check); }
        #[test]
        fn neon() { on(Isa::Neon, super::$check); }
    })+ };
}

on_every_isa!(
    products,
    extreme_codes,
    activations,
    functions,
    norms,
    mixer,
    mixer_in_chunks,
    exact_sizes,
    not_finite_activations
);

/// Those that plain Rust is the truth of.
mod same_bits {
    use super::{Isa, on};
    #[test]
    fn avx2() {
        on(Isa::Avx2, super::same_bits);
    }
    #[test]
    fn avx512() {
        on(Isa::Avx512, super::same_bits);
    }
    #[test]
    fn amx() {
        on(Isa::Amx, super::same_bits);
    }
    #[test]
    fn neon() {
        on(Isa::Neon, super::same_bits);
    }
}

/// The bits, those of every NaN the same.
fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

/// A NaN or an infinity among the activations comes out of every product as NaN: quantizing does not hide it.
fn not_finite_activations(isa: Isa) {
    for ty in GgmlType::all() {
        let cols = 512;
        let (bytes, _) = weights(ty, 17, cols, 3);
        let matrix = MatrixRef::new(ty, 17, cols, &bytes).unwrap();
        for (at, odd) in [(0, f32::NAN), (31, f32::INFINITY), (300, f32::NAN), (511, f32::NEG_INFINITY)] {
            for tokens in [1, 8, 9, 17] {
                let mut x = Random::new(4).floats(tokens * cols);
                x[at] = odd;
                let mut c = Compute::new(isa, 1, 17);
                let mut acts = Acts::with_capacity(tokens, cols);
                c.norm(&x, &vec![1.0; cols], 1e-5, ActKind::for_weights(ty, false), &mut acts);
                let mut out = vec![0.0; tokens * 17];
                c.matmul(&matrix, &acts, &mut out, Then::Store);
                let (first, others) = out.split_at(17);
                assert!(first.iter().all(|y| y.is_nan()), "{} {ty}, {odd} at {at}: {first:?}", isa.name());
                assert!(others.iter().all(|y| y.is_finite()), "{} {ty}, {odd} at {at}", isa.name());
            }
        }
    }
}

/// The types of bitsandbytes with sizes of their blocks; int8 has one a row.
fn bnb_matrices() -> impl Iterator<Item = (WeightType, Option<usize>)> {
    let four_bit = [WeightType::Nf4, WeightType::Fp4].into_iter();
    let sizes = [32, 64, 256, 512, 4096].map(Some);
    four_bit.flat_map(move |ty| sizes.map(|size| (ty, size))).chain([(WeightType::Int8, None)])
}

/// Random codes with random scales beside them, times int8 activations.
fn beside_product(
    isa: Isa,
    dtype: WeightType,
    (rows, cols): (usize, usize),
    blocksize: usize,
    tokens: usize,
) -> Vec<u32> {
    let mut random = Random::new(99);
    let n_bytes = if dtype == WeightType::Int8 { rows * cols } else { rows * cols / 2 };
    let bytes: Vec<u8> = (0..n_bytes).map(|_| random.bits() as u8).collect();
    let absmax: Vec<f32> =
        random.floats((rows * cols).div_ceil(blocksize)).iter().map(|x| x.abs() + 0.1).collect();
    let scales = Scales { blocksize, round_to: GgmlType::F32, absmax: Absmax::F32(&absmax) };
    let matrix = MatrixRef::with_scales(dtype, rows, cols, &bytes, Some(scales)).unwrap();
    let mut c = Compute::new(isa, 1, 64);
    c.reserve_blocks(cols);
    let acts = acts(&mut c, tokens, cols, ActKind::for_weights_of_bnb(dtype), 77);
    let mut out = Random::new(5).floats(tokens * rows);
    c.matmul(&matrix, &acts, &mut out, Then::Add);
    bits(&out)
}

/// Every result is that of plain Rust, to the bit: products of all types with few and many tokens, the functions, the
/// norm, a mixer with its states.
fn same_bits(isa: Isa) {
    let product = |isa, ty: GgmlType, matrix: &MatrixRef<'_>, tokens: usize, precise| {
        let mut c = Compute::new(isa, 1, 64);
        let acts = acts(&mut c, tokens, matrix.cols, ActKind::for_weights(ty, precise), 77);
        let mut out = Random::new(5).floats(tokens * 35);
        c.matmul(matrix, &acts, &mut out, Then::Add);
        bits(&out)
    };
    for ty in GgmlType::all() {
        let blocks = |n: usize| n.next_multiple_of(ty.block_len());
        // Odd and even blocks, less and more than a panel; around the tiles and the two paths.
        for cols in [blocks(1), blocks(300), blocks(1100), blocks(2040)] {
            let (bytes, _) = weights(ty, 35, cols, 99);
            let matrix = MatrixRef::new(ty, 35, cols, &bytes).unwrap();
            for tokens in [1, 3, 4, 5, 6, 7, 8, 13, 16, 17, 32, 35, 50] {
                for precise in [false, true] {
                    let truth = product(isa.truth(), ty, &matrix, tokens, precise);
                    let same = truth == product(isa, ty, &matrix, tokens, precise);
                    assert!(same, "{} {ty} {cols} columns, {tokens} tokens, precise {precise}", isa.name());
                }
            }
        }
    }
    for (dtype, blocksize) in bnb_matrices() {
        // Short rows go four at a time, and their scales may serve several of them, or begin in the middle of a row.
        for (rows, cols) in [(35, 256), (18, 128), (19, 384), (3, 2048)] {
            let blocksize = blocksize.unwrap_or(cols);
            for tokens in [1, 2, 3, 5, 6, 17] {
                let product = |isa| beside_product(isa, dtype, (rows, cols), blocksize, tokens);
                let same = product(isa.truth()) == product(isa);
                assert!(
                    same,
                    "{} {dtype} {rows} x {cols}, {tokens} tokens, scales of {blocksize}",
                    isa.name()
                );
            }
        }
    }
    let mut ys = [kernels(Isa::Scalar), kernels(isa)].map(|k| {
        let mut x = all_magnitudes();
        x.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN]);
        let mut norm = Random::new(8).floats(4099);
        k.rms_norm(&mut norm, 1e-5);
        let run = |f: &dyn Fn(&mut [f32])| {
            let mut y = x.clone();
            f(&mut y);
            bits(&y)
        };
        [run(&|x| k.exp(x)), run(&|x| k.silu(x)), run(&|x| k.softplus(x)), bits(&norm)].into_iter()
    });
    for what in ["exp", "silu", "softplus", "norm"] {
        let [truth, got] = [ys[0].next(), ys[1].next()];
        assert!(truth == got, "{} {what}", isa.name());
    }
    for case in mixer_cases() {
        for chunks in [&[MIXER_TOKENS][..], &[1; MIXER_TOKENS]] {
            let [truth, got] = [Isa::Scalar, isa].map(|isa| case.run(isa, 1, chunks));
            let same = bits(&truth.0) == bits(&got.0) && truth.1.to_bytes() == got.1.to_bytes();
            assert!(same, "{} mixer, d_inner {}, chunks {chunks:?}", isa.name(), case.d_inner);
        }
    }
}

/// Weights of a type from random floats, and the matrix in f32.
fn weights(ty: GgmlType, rows: usize, cols: usize, seed: u64) -> (Vec<u8>, Vec<f32>) {
    let x = Random::new(seed).floats(rows * cols);
    let mut bytes = vec![0; ty.bytes_for((rows * cols) as u64).unwrap() as usize];
    codec(ty).quantize(&x, None, &mut bytes);
    let mut floats = vec![0.0; rows * cols];
    codec(ty).dequantize(&bytes, &mut floats);
    (bytes, floats)
}

/// Random activations (n_tokens, cols) stored as `kind`, by way of the norm.
fn acts(c: &mut Compute, n_tokens: usize, cols: usize, kind: ActKind, seed: u64) -> Acts {
    let x = Random::new(seed).floats(n_tokens * cols);
    let mut acts = Acts::with_capacity(n_tokens, cols);
    c.norm(&x, &vec![1.0; cols], 1e-5, kind, &mut acts);
    acts
}

/// How far the weights of a row may be from those that are multiplied, block after block: with many tokens Q4_K becomes
/// int8 (`runtime/src/kernels/as_int8.rs`), by half a code and the rounding of its table.
fn tolerances(isa: Isa, m: &MatrixRef<'_>, r: usize, acts: &Acts) -> Vec<f64> {
    let ty = GgmlType::Q4K;
    if isa.truth() != Isa::ScalarInt8
        || m.dtype != ty
        || acts.kind() != ActKind::Q8x256
        || acts.n_tokens() < 17
    {
        return vec![0.0; m.cols];
    }
    let row = &m.bytes[r * m.row_bytes()..][..m.row_bytes()];
    let of_block = |block: &[u8]| {
        let block: &[u8; q4_k::BYTES] = block.try_into().unwrap();
        let (d, dmin) = (f64::from(f16_at(block, q4_k::D)), f64::from(f16_at(block, q4_k::DMIN)));
        let ends = (0..8).flat_map(|j| {
            let (scale, min) = q4_k::scale_min(q4_k::packed_scales(block), j);
            let first = -dmin * f64::from(min);
            [first, first + 15.0 * d * f64::from(scale)]
        });
        ends.fold(0.0f64, |largest, end| largest.max(end.abs())) / 127.0 * (0.5 + 9.0 / 256.0)
    };
    row.chunks_exact(ty.block_bytes()).flat_map(|block| [of_block(block); 256]).collect()
}

/// Compares a product with f64: `|got - truth| <= 4·n·eps·Σ|w·a|`, and what [`tolerances`] adds.
fn check_product(c: &mut Compute, m: &MatrixRef<'_>, floats: &[f32], acts: &Acts, what: &str) {
    let before = Random::new(5).floats(acts.n_tokens() * m.rows);
    let tokens: Vec<Vec<f32>> = (0..acts.n_tokens()).map(|t| acts.to_f32(t)).collect();
    for then in [Then::Store, Then::Add] {
        let mut out = before.clone();
        c.matmul(m, acts, &mut out, then);
        for r in 0..m.rows {
            let tolerances = tolerances(c.isa(), m, r, acts);
            for (t, a) in tokens.iter().enumerate() {
                let at = t * m.rows + r;
                let base = if then == Then::Add { f64::from(before[at]) } else { 0.0 };
                let products =
                    floats[r * m.cols..][..m.cols].iter().zip(a).map(|(&w, &a)| f64::from(w) * f64::from(a));
                let (sum, magnitude) = products.fold((base, base.abs()), |(s, m), p| (s + p, m + p.abs()));
                let of_weights: f64 = tolerances.iter().zip(a).map(|(w, &a)| w * f64::from(a.abs())).sum();
                let bound = 4.0 * m.cols as f64 * f64::from(f32::EPSILON) * magnitude + of_weights + 1e-30;
                let error = (f64::from(out[at]) - sum).abs();
                assert!(
                    error <= bound,
                    "{what} {then:?} row {r} token {t}: {} instead of {sum}, bound {bound}",
                    out[at]
                );
            }
        }
    }
}

/// Weights as many tokens meet them differ from those of Q4_K by about 1 % of the variance that Q4_K's own error has:
/// what `runtime/src/kernels/as_int8.rs` promises, for weights from a normal distribution.
#[test]
fn the_error_of_q4_k_as_int8() {
    let (rows, cols) = (64, 256);
    let mut random = Random::new(21);
    // Sums of twelve uniform numbers.
    let x: Vec<f32> = (0..rows * cols).map(|_| (0..12).map(|_| random.float()).sum::<f32>() / 2.0).collect();
    let mut bytes = vec![0; GgmlType::Q4K.bytes_for((rows * cols) as u64).unwrap() as usize];
    let mut own = vec![0.0; rows * cols];
    codec(GgmlType::Q4K).quantize(&x, None, &mut bytes);
    codec(GgmlType::Q4K).dequantize(&bytes, &mut own);
    // The products with unit vectors are the weights.
    let mut c = Compute::new(Isa::ScalarInt8, 1, cols);
    let mut unit: Vec<f32> = vec![0.0; cols * cols];
    (0..cols).for_each(|t| unit[t * cols + t] = 1.0);
    let mut acts = Acts::with_capacity(cols, cols);
    c.split_dt_b_c(&mut unit, cols, 0, None, ActKind::Q8x256, &mut acts);
    let mut met = vec![0.0; cols * rows];
    c.matmul(&MatrixRef::new(GgmlType::Q4K, rows, cols, &bytes).unwrap(), &acts, &mut met, Then::Store);
    let square = |d: f32| f64::from(d) * f64::from(d);
    let mut errors = [0.0; 2];
    for r in 0..rows {
        for k in 0..cols {
            errors[0] += square(own[r * cols + k] - x[r * cols + k]);
            errors[1] += square(met[k * rows + r] - own[r * cols + k]);
        }
    }
    let share = errors[1] / errors[0];
    println!("{:.2} %", 100.0 * share);
    assert!((0.002..0.012).contains(&share), "{share}");
}

/// All types, both kinds of activations, with sizes around every tile: rows around 16 and 32, tokens around the tiles
/// of 1, 2, 3, 4, 6, 12 and the thresholds between the two paths, columns around one panel of 1024. 165 rows are a high panel
/// and a low one, 56 and 70 tokens more than the groups of a tile by one and by two.
fn products(isa: Isa) {
    let small = [(1, 1, 1), (2, 47, 2), (1, 15, 13), (3, 33, 5), (2, 64, 8), (1, 17, 31), (1, 16, 64)];
    let high = [(1, 165, 56), (1, 165, 70)];
    for (threads, rows, tokens) in small.into_iter().chain(high) {
        let mut c = Compute::new(isa, threads, 70);
        let most_products = if rows > 128 { 7 << 20 } else { 1 << 20 };
        for ty in GgmlType::all() {
            let block = ty.block_len();
            let lens: &[usize] = if block == 1 { &[1, 15, 16, 17, 255, 1041] } else { &[1, 3, 4] };
            let long = if block == 1 { 1100 } else { 1024 / block + 1 };
            for &cols in lens.iter().chain([&long]) {
                let cols = cols * block;
                if cols * rows * tokens > most_products {
                    continue;
                }
                let (bytes, floats) = weights(ty, rows, cols, (rows * 1000 + cols) as u64);
                let m = MatrixRef::new(ty, rows, cols, &bytes).unwrap();
                for precise in [false, true] {
                    let kind = ActKind::for_weights(ty, precise);
                    let acts = acts(&mut c, tokens, cols, kind, cols as u64);
                    let what = format!("{} {ty} {kind:?} {rows}x{cols}x{tokens}", isa.name());
                    check_product(&mut c, &m, &floats, &acts, &what);
                }
            }
        }
    }
}

/// Blocks of any bits whatever except for the f16 scales, with activations that are all ±127: what overflows, does so
/// here.
fn extreme_codes(isa: Isa) {
    let half = half::f16::from_f32(0.0013).to_le_bytes();
    for ty in GgmlType::all().filter(|ty| ty.is_quantized()) {
        let f16_fields: &[usize] = match ty {
            GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
            GgmlType::Q2K => &[80, 82],
            GgmlType::Q3K => &[108],
            GgmlType::Q6K => &[208],
            _ => &[0],
        };
        let (rows, cols) = (35, 512);
        for fill in [None, Some(0x00), Some(0x80), Some(0x7f), Some(0xff)] {
            let mut random = Random::new(ty.id().into());
            let n_bytes = ty.bytes_for((rows * cols) as u64).unwrap() as usize;
            let mut bytes: Vec<u8> =
                (0..n_bytes).map(|_| fill.unwrap_or((random.bits() >> 32) as u8)).collect();
            for block in bytes.chunks_exact_mut(ty.block_bytes()) {
                f16_fields.iter().for_each(|&at| block[at..at + 2].copy_from_slice(&half));
            }
            let mut floats = vec![0.0; rows * cols];
            codec(ty).dequantize(&bytes, &mut floats);
            let m = MatrixRef::new(ty, rows, cols, &bytes).unwrap();
            let mut c = Compute::new(isa, 1, 49);
            for tokens in [1, 8, 16, 17, 49] {
                let kind = ActKind::for_weights(ty, false);
                let x: Vec<f32> = (0..tokens * cols)
                    .map(|i| if fill.is_some() || i % 3 == 0 { 1.0 } else { -1.0 })
                    .collect();
                let mut acts = Acts::with_capacity(tokens, cols);
                c.norm(&x, &vec![1.0; cols], 0.0, kind, &mut acts);
                check_product(&mut c, &m, &floats, &acts, &format!("{} {ty} {fill:?}", isa.name()));
            }
        }
    }
}

/// Codes are within half a step, and equal on every instruction set.
fn activations(isa: Isa) {
    for (kind, cols) in [
        (ActKind::Q8x32, 32),
        (ActKind::Q8x32, 352),
        (ActKind::Q8x32EvenOdd, 352),
        (ActKind::Q8x256, 256),
        (ActKind::Q8x256, 1280),
    ] {
        for scale in [1e-42f32, 1e-30, 1e-3, 1.0, 1e20] {
            let x: Vec<f32> = Random::new(7).floats(5 * cols).iter().map(|x| x * scale).collect();
            let stored = [Isa::Scalar, isa].map(|isa| {
                let mut c = Compute::new(isa, 1, 5);
                let mut acts = Acts::with_capacity(5, cols);
                // x itself, as the dt of a model without norms.
                let mut rows = x.clone();
                c.split_dt_b_c(&mut rows, cols, 0, None, kind, &mut acts);
                acts
            });
            let len = kind.block_len();
            for t in 0..5 {
                let got = stored[1].to_f32(t);
                assert_eq!(got, stored[0].to_f32(t), "{} {kind:?}", isa.name());
                for (x, got) in x[t * cols..][..cols].chunks(len).zip(got.chunks(len)) {
                    let step = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
                    for (x, got) in x.iter().zip(got) {
                        // Below 1e-36 a block counts as zeros.
                        assert!((x - got).abs() <= step * 0.501 + 1e-36, "{x} {got} {step}");
                    }
                }
            }
        }
    }
}

/// Every f32 of a dense grid over all exponents and both signs, and the special ones.
fn all_magnitudes() -> Vec<f32> {
    let mut x: Vec<f32> = (0..0x7f80_0000u32).step_by(0x1_2345).map(f32::from_bits).collect();
    x.extend([
        0.0,
        f32::MIN_POSITIVE,
        f32::MAX,
        0.5,
        1.0,
        19.999_998,
        20.0,
        20.000_002,
        87.3,
        88.72,
        88.73,
        89.0,
        103.9,
    ]);
    x.extend((0..40_000).map(|i| i as f32 * 0.0026));
    let negative: Vec<f32> = x.iter().map(|x| -x).collect();
    x.extend(negative);
    x
}

fn check_function(
    isa: Isa,
    name: &str,
    run: impl Fn(&mut [f32]),
    truth: impl Fn(f64) -> f64,
    relative: f64,
    absolute: f64,
) {
    let x = all_magnitudes();
    let mut y = x.clone();
    run(&mut y);
    let mut worst = 0f64;
    for (&x, &y) in x.iter().zip(&y) {
        let exact = truth(f64::from(x));
        let rounded = exact as f32;
        if rounded.is_infinite() || y.is_infinite() {
            let near_limit = exact.abs() > f64::from(f32::MAX) * (1.0 - 1e-6)
                && exact.abs() < f64::from(f32::MAX) * (1.0 + 1e-6);
            assert!(rounded == y || near_limit, "{} {name}({x}) = {y}, not {exact}", isa.name());
            continue;
        }
        let error = (f64::from(y) - exact).abs();
        assert!(error <= relative * exact.abs() + absolute, "{} {name}({x}) = {y}, not {exact}", isa.name());
        if exact.abs() > 1e-30 {
            worst = worst.max(error / exact.abs());
        }
    }
    println!("{} {name}: worst relative error {worst:.2e}", isa.name());
}

/// exp, SiLU and softplus over the whole range, with the bounds that their comments state.
fn functions(isa: Isa) {
    let k = kernels(isa);
    let denormal_step = f64::from(f32::from_bits(1));
    check_function(isa, "exp", |x| k.exp(x), f64::exp, 2e-7, denormal_step);
    check_function(isa, "silu", |x| k.silu(x), |x| x / (1.0 + (-x).exp()), 6e-7, 1e-36);
    check_function(
        isa,
        "softplus",
        |x| k.softplus(x),
        |x| x.max(0.0) + (-x.abs()).exp().ln_1p(),
        6e-7,
        3.0 * denormal_step,
    );
    let special = |f: &dyn Fn(&mut [f32]), x: f32| {
        let mut x = [x];
        f(&mut x);
        x[0]
    };
    let (exp, silu, softplus) =
        (|x: &mut [f32]| k.exp(x), |x: &mut [f32]| k.silu(x), |x: &mut [f32]| k.softplus(x));
    assert!([&exp as &dyn Fn(&mut [f32]), &silu, &softplus].iter().all(|f| special(f, f32::NAN).is_nan()));
    assert_eq!([special(&exp, f32::INFINITY), special(&exp, f32::NEG_INFINITY)], [f32::INFINITY, 0.0]);
    assert_eq!(
        [special(&softplus, f32::INFINITY), special(&softplus, f32::NEG_INFINITY)],
        [f32::INFINITY, 0.0]
    );
    assert_eq!(special(&silu, f32::INFINITY), f32::INFINITY);
    assert!(special(&silu, f32::NEG_INFINITY).is_nan());
    assert_eq!(special(&exp, 0.0), 1.0);
}

fn norms(isa: Isa) {
    for (n, eps) in [(1, 1e-5f32), (8, 1e-6), (15, 1e-5), (16, 0.0), (17, 1e-5), (255, 1e-6), (4096, 1e-5)] {
        for scale in [1e-4f32, 1.0, 1e4] {
            let x: Vec<f32> = Random::new(n as u64).floats(n).iter().map(|x| x * scale).collect();
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
            let factor = 1.0 / (mean + f64::from(eps)).sqrt();
            let mut weightless = x.clone();
            kernels(isa).rms_norm(&mut weightless, eps);
            let weight = Random::new(3).floats(n);
            let mut c = Compute::new(isa, 1, 1);
            let mut acts = Acts::with_capacity(1, n);
            c.norm(&x, &weight, eps, ActKind::F32, &mut acts);
            for (i, got) in acts.to_f32(0).into_iter().enumerate() {
                let truth = f64::from(x[i]) * factor;
                let bound = 1e-6 * truth.abs();
                assert!((f64::from(weightless[i]) - truth).abs() <= bound, "{} n {n}", isa.name());
                let (truth, bound) = (truth * f64::from(weight[i]), bound * f64::from(weight[i].abs()));
                assert!((f64::from(got) - truth).abs() <= bound, "{} n {n}", isa.name());
            }
        }
    }
}

/// A random mixer in f32 and its f64 reference.
struct MixerCase {
    d_model: usize,
    d_inner: usize,
    d_state: usize,
    d_conv: usize,
    dt_rank: usize,
    in_proj: Vec<f32>,
    conv_weight: Vec<f32>,
    conv_bias: Vec<f32>,
    dt_proj: Vec<f32>,
    dt_bias: Vec<f32>,
    a: Vec<f32>,
    d: Vec<f32>,
    /// (T, d_model) and (T, dt_rank + 2·d_state).
    x: Vec<f32>,
    dt_b_c: Vec<f32>,
}

const MIXER_TOKENS: usize = 23;

impl MixerCase {
    fn new(d_inner: usize, d_state: usize, d_conv: usize, dt_rank: usize) -> Self {
        let (d_model, t) = (40, MIXER_TOKENS);
        let mut r = Random::new((d_inner + 100 * d_state + 7 * d_conv) as u64);
        let mut f = |n: usize, scale: f32| r.floats(n).iter().map(|x| x * scale).collect::<Vec<f32>>();
        Self {
            d_model,
            d_inner,
            d_state,
            d_conv,
            dt_rank,
            in_proj: f(2 * d_inner * d_model, 0.3),
            conv_weight: f(d_inner * d_conv, 1.0),
            conv_bias: f(d_inner, 0.5),
            dt_proj: f(d_inner * dt_rank, 0.7),
            dt_bias: f(d_inner, 1.5),
            a: f(d_inner * d_state, 4.0).iter().map(|x| -x.abs()).collect(),
            d: f(d_inner, 1.0),
            x: f(t * d_model, 1.0),
            dt_b_c: f(t * (dt_rank + 2 * d_state), 1.0),
        }
    }

    /// y (T, d_inner) with everything in f64, token after token, straight from the definition.
    fn reference(&self) -> Vec<f64> {
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let dot =
            |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
        let (di, ds, dc) = (self.d_inner, self.d_state, self.d_conv);
        let mut y = vec![0.0; MIXER_TOKENS * di];
        for c in 0..di {
            let row = |r: usize| &self.in_proj[r * self.d_model..][..self.d_model];
            let input = |t: usize| dot(row(c), &self.x[t * self.d_model..][..self.d_model]);
            let mut h = vec![0.0; ds];
            for t in 0..MIXER_TOKENS {
                let mut sum = f64::from(self.conv_bias[c]);
                for j in 0..dc {
                    if t + j + 1 >= dc {
                        sum += f64::from(self.conv_weight[c * dc + j]) * input(t + j + 1 - dc);
                    }
                }
                let u = silu(sum);
                let z = dot(row(di + c), &self.x[t * self.d_model..][..self.d_model]);
                let dt_b_c = &self.dt_b_c[t * (self.dt_rank + 2 * ds)..];
                let dt = dot(&self.dt_proj[c * self.dt_rank..][..self.dt_rank], dt_b_c)
                    + f64::from(self.dt_bias[c]);
                let delta = if dt > 20.0 { dt } else { dt.exp().ln_1p() };
                let mut out = f64::from(self.d[c]) * u;
                for (n, h) in h.iter_mut().enumerate() {
                    let a = f64::from(self.a[c * ds + n]);
                    *h = (delta * a).exp() * *h + delta * f64::from(dt_b_c[self.dt_rank + n]) * u;
                    out += f64::from(dt_b_c[self.dt_rank + ds + n]) * *h;
                }
                y[t * di + c] = out * silu(z);
            }
        }
        y
    }

    /// y (T, d_inner) by the kernels, and the state, with the tokens cut into chunks.
    fn run(&self, isa: Isa, threads: usize, chunks: &[usize]) -> (Vec<f32>, State) {
        let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (in_proj, dt_proj) = (bytes(&self.in_proj), bytes(&self.dt_proj));
        let in_proj = MatrixRef::new(GgmlType::F32, 2 * self.d_inner, self.d_model, &in_proj).unwrap();
        let dt_proj = MatrixRef::new(GgmlType::F32, self.d_inner, self.dt_rank, &dt_proj).unwrap();
        let shape = HyperParams {
            arch: Arch::FalconMamba,
            d_model: self.d_model,
            d_inner: self.d_inner,
            d_state: self.d_state,
            d_conv: self.d_conv,
            dt_rank: self.dt_rank,
            n_layer: 1,
            vocab_size: 1,
            layer_norm_epsilon: 1e-5,
            mixer_rms_eps: 1e-5,
        };
        let mut state = State::new(StateShape::new(&shape, 0));
        let mut c = Compute::new(isa, threads, MIXER_TOKENS);
        let room = |n: usize| Acts::with_capacity(MIXER_TOKENS, n);
        let (mut x, mut inner, mut dt) = (room(self.d_model), room(self.d_inner), room(self.dt_rank));
        let mut mixer = Mixer::with_capacity(self.d_inner, MIXER_TOKENS);
        let conv_weight = ByChannel::new(&self.conv_weight, self.d_conv);
        let a = ByChannel::new(&self.a, self.d_state);
        let layer = InProj {
            weights: in_proj,
            conv_weight: &conv_weight,
            conv_bias: &self.conv_bias,
            d_conv: self.d_conv,
        };
        let scan = ScanWeights { dt_proj, dt_bias: &self.dt_bias, a: &a, d: &self.d, d_state: self.d_state };
        let (mut y, mut first) = (Vec::new(), 0);
        for &n in chunks {
            let mut rows = self.x[first * self.d_model..][..n * self.d_model].to_vec();
            c.split_dt_b_c(&mut rows, self.d_model, 0, None, ActKind::F32, &mut x);
            let segments = [Segment { state: &mut state, n_tokens: n }];
            c.in_proj(&layer, &x, &segments, 0, &mut mixer, ActKind::F32, &mut inner);
            let width = self.dt_rank + 2 * self.d_state;
            let mut dt_b_c = self.dt_b_c[first * width..][..n * width].to_vec();
            c.split_dt_b_c(&mut dt_b_c, self.dt_rank, self.d_state, None, ActKind::F32, &mut dt);
            c.scan(&scan, &dt, &dt_b_c, &segments, 0, &mut mixer, ActKind::F32, &mut inner);
            (0..n).for_each(|t| y.extend(inner.to_f32(t)));
            first += n;
        }
        (y, state)
    }
}

/// The convolution's inputs and the scan's h; a saved state is a header of 56 bytes and these.
fn state_numbers(state: &State) -> Vec<f32> {
    state.to_bytes()[56..].as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// d_inner around the blocks of 16 and the units of 256, d_state with and without its own loop, several d_conv.
fn mixer_cases() -> Vec<MixerCase> {
    let shapes = [
        (16, 16, 4, 16),
        (24, 16, 4, 3),
        (1, 8, 2, 1),
        (272, 8, 3, 17),
        (520, 16, 4, 5),
        (33, 5, 1, 8),
        (48, 24, 8, 2),
    ];
    shapes.map(|(d_inner, d_state, d_conv, dt_rank)| MixerCase::new(d_inner, d_state, d_conv, dt_rank)).into()
}

fn close(got: &[f32], truth: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), truth.len(), "{what}");
    let largest = truth.iter().fold(0f64, |m, y| m.max(y.abs()));
    for (i, (&got, &truth)) in got.iter().zip(truth).enumerate() {
        assert!((f64::from(got) - truth).abs() <= tolerance * largest, "{what} at {i}: {got}, not {truth}");
    }
}

/// in_proj, convolution, scan and gate together against the definition.
fn mixer(isa: Isa) {
    for case in mixer_cases() {
        let truth = case.reference();
        for threads in [1, 2, 3] {
            let (y, _) = case.run(isa, threads, &[MIXER_TOKENS]);
            close(&y, &truth, 3e-6, &format!("{} d_inner {} threads {threads}", isa.name(), case.d_inner));
        }
    }
}

/// Chunks of any size give the same, states included; threads change no bit.
fn mixer_in_chunks(isa: Isa) {
    for case in mixer_cases() {
        let whole = case.run(isa, 1, &[MIXER_TOKENS]);
        assert!(whole == case.run(isa, 3, &[MIXER_TOKENS]), "three threads");
        for chunks in [&[1; MIXER_TOKENS][..], &[2, 1, 13, 7], &[22, 1], &[3, 20]] {
            let parts = case.run(isa, 1, chunks);
            let states = [&parts.1, &whole.1].map(state_numbers);
            for (got, truth) in [(&parts.0, &whole.0), (&states[0], &states[1])] {
                let truth: Vec<f64> = truth.iter().map(|&x| x.into()).collect();
                close(
                    got,
                    &truth,
                    3e-6,
                    &format!("{} d_inner {} chunks {chunks:?}", isa.name(), case.d_inner),
                );
            }
        }
    }
}

/// Products from weights that end where their memory ends: reading on would touch the next page.
fn exact_sizes(isa: Isa) {
    let mut c = Compute::new(isa, 1, 49);
    for ty in GgmlType::all() {
        let cols = ty.block_len().max(16) * 3;
        let (bytes, floats) = weights(ty, 19, cols, 11);
        // A boxed slice has no spare capacity; tools that watch the heap (valgrind, sanitizers) see any read beyond.
        let exact: Box<[u8]> = bytes.into_boxed_slice();
        let m = MatrixRef::new(ty, 19, cols, &exact).unwrap();
        for tokens in [1, 8, 16, 17, 49] {
            let acts = acts(&mut c, tokens, cols, ActKind::for_weights(ty, false), 1);
            check_product(&mut c, &m, &floats, &acts, &format!("{} {ty}", isa.name()));
        }
    }
}

/// A matrix is refused unless its bytes are exactly rows · cols weights in whole blocks.
#[test]
fn a_matrix_has_exactly_its_bytes() {
    let bytes = [0; 288];
    assert!(MatrixRef::new(GgmlType::Q4K, 2, 256, &bytes).is_ok());
    for (rows, cols) in [(1, 256), (3, 256), (2, 255), (2, 0), (usize::MAX, 256), (2, usize::MAX)] {
        let error = MatrixRef::new(GgmlType::Q4K, rows, cols, &bytes).err().map(|e| e.kind());
        assert_eq!(error, Some(kestrel_formats::ErrorKind::BadShape), "{rows} x {cols}");
    }
}
