//! candle-core's quantized matrix product beside ours: the same bytes, the same activations, in turns.
//!
//!     scripts/bench/candle/run
//!
//! Both use as many threads as the machine has. One
//! token reads several copies of the matrix in turn, which no cache holds together.
#![forbid(unsafe_code)]

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor};
use kestrel_formats::GgmlType;
use kestrel_quant::codec;
use kestrel_runtime::kernels::{ActKind, Acts, Compute, Isa, MatrixRef, Then};
use std::borrow::Cow;
use std::time::Instant;

const ROWS: usize = 4096;
const COLS: usize = 4096;
/// Bytes of all copies of a matrix.
const COPIES_BYTES: usize = 1 << 30;
const REPEATS: usize = 7;
/// Calls in a row that make one measurement of one token.
const CALLS: usize = 32;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let types =
        [(GgmlType::Q4K, GgmlDType::Q4K), (GgmlType::Q8_0, GgmlDType::Q8_0), (GgmlType::Q6K, GgmlDType::Q6K)];
    let isa = Isa::from_env()?;
    let threads = std::thread::available_parallelism()?.get();
    println!("{ROWS} x {COLS}, {threads} threads, ours with {}; medians of {REPEATS}", isa.name());
    for (ty, candle_type) in types {
        let bytes = quantized(ty);
        let n_copies = COPIES_BYTES.div_ceil(bytes.len());
        let ours = bytes.repeat(n_copies);
        let theirs = (0..n_copies)
            .map(|_| {
                let storage = QStorage::from_data(Cow::Borrowed(&bytes), &Device::Cpu, candle_type)?;
                QMatMul::from_qtensor(QTensor::new(storage, (ROWS, COLS))?)
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        for tokens in [1, 512] {
            let x = noise(tokens * COLS);
            let mut compute = Compute::new(isa, threads, tokens);
            let mut acts = Acts::with_capacity(tokens, COLS);
            let mut out = vec![0.0; tokens * ROWS];
            let candle_x = Tensor::from_slice(&x, (tokens, COLS), &Device::Cpu)?;
            // Both quantize the activations in every call. Weights of 1 leave ours what x is but for its norm.
            let mut our_call = |i: usize| -> candle_core::Result<f32> {
                let copy = &ours[i % n_copies * bytes.len()..][..bytes.len()];
                let matrix = MatrixRef::new(ty, ROWS, COLS, copy).expect("the bytes of a matrix");
                compute.norm(&x, &[1.0; COLS], 0.0, ActKind::for_weights(ty, false), &mut acts);
                compute.matmul(&matrix, &acts, &mut out, Then::Store);
                Ok(out[0])
            };
            let mut candle_call =
                |i: usize| theirs[i % n_copies].forward(&candle_x)?.flatten_all()?.get(0)?.to_scalar::<f32>();
            check(our_call(0)?, candle_call(0)?, &x[..COLS]);
            let calls = if tokens == 1 { CALLS } else { 1 };
            let (mut our_times, mut candle_times) = (Vec::new(), Vec::new());
            for repeat in 0..REPEATS {
                our_times.push(time(repeat * calls, calls, &mut our_call)?);
                candle_times.push(time(repeat * calls, calls, &mut candle_call)?);
            }
            let (ours_s, candle_s) = (median(our_times), median(candle_times));
            let (unit, amount) = match tokens {
                1 => ("GB/s", bytes.len() as f64 / 1e9),
                _ => ("GMAC/s", (tokens * ROWS * COLS) as f64 / 1e9),
            };
            println!(
                "{ty:5} {tokens:3} tokens: ours {:7.1} {unit}, candle {:7.1} {unit}, {:.2} times as fast",
                amount / ours_s,
                amount / candle_s,
                candle_s / ours_s
            );
        }
    }
    Ok(())
}

/// Both compute the same: the norm divides ours by the root mean square of `x`; what is left is rounding to int8.
fn check(ours: f32, candle: f32, x: &[f32]) {
    let rms = (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt();
    let error = (ours * rms - candle).abs();
    assert!(error < 0.02 * rms * (x.len() as f32).sqrt(), "{} and {candle}", ours * rms);
}

/// Seconds of one call, over several.
fn time(
    first: usize,
    calls: usize,
    call: &mut dyn FnMut(usize) -> candle_core::Result<f32>,
) -> candle_core::Result<f64> {
    let started = Instant::now();
    for i in 0..calls {
        std::hint::black_box(call(first + i)?);
    }
    Ok(started.elapsed().as_secs_f64() / calls as f64)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// A matrix of `ty`; the rows repeat.
fn quantized(ty: GgmlType) -> Vec<u8> {
    const DISTINCT: usize = 16;
    let n_bytes = ty.bytes_for((DISTINCT * COLS) as u64).expect("whole blocks");
    let mut rows = vec![0; n_bytes as usize];
    codec(ty).quantize(&noise(DISTINCT * COLS), None, &mut rows);
    rows.repeat(ROWS / DISTINCT)
}

/// Random-looking numbers in -1..1.
fn noise(n: usize) -> Vec<f32> {
    let mut x = 1u64;
    let step = |_| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(step).collect()
}
