//! Speed of the kernels on the 7B's shapes, beside the machine's own limits: read bandwidth and, on AVX-512, the peak
//! of the int8 dot product. Medians of several repeats.
//!
//! `cargo run --release -p kestrel-runtime --example kernel_bench -- [threads] [type ...]`

#![allow(clippy::print_stdout, missing_docs)]

use kestrel_formats::GgmlType;
use kestrel_quant::codec;
use kestrel_runtime::kernels::{ActKind, Acts, Compute, InProj, Isa, MatrixRef, Mixer, ScanWeights, Then};
use kestrel_runtime::pool::Pool;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The median time of `run` in seconds.
fn median(repeats: usize, mut run: impl FnMut()) -> f64 {
    run();
    let mut times: Vec<f64> = (0..repeats)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[repeats / 2]
}

/// Bytes per second that `pool` reads from memory, from a buffer much larger than the caches.
fn read_bandwidth(pool: &mut Pool) -> f64 {
    let words = vec![1u64; 64 << 20];
    let sum = AtomicU64::new(0);
    let n = pool.n_workers();
    let time = median(5, || {
        pool.run(|w| {
            let part = &words[words.len() / n * w..words.len() / n * (w + 1)];
            // Four streams, enough independent sums to be limited by the memory.
            let quarter = part.len() / 4;
            let mut sums = [0u64; 32];
            for i in (0..quarter / 8 * 8).step_by(8) {
                for s in 0..4 {
                    for j in 0..8 {
                        sums[8 * s + j] = sums[8 * s + j].wrapping_add(part[s * quarter + i + j]);
                    }
                }
            }
            sum.fetch_add(sums.iter().sum(), Ordering::Relaxed);
        });
    });
    (words.len() * 8) as f64 / time
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot_loop(n: usize) -> i32 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 16];
    let (a, b) = (_mm512_set1_epi8(3), _mm512_set1_epi32(std::hint::black_box(5)));
    for _ in 0..n {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    sums.iter().fold(0, |s, &v| s.wrapping_add(_mm512_reduce_add_epi32(v)))
}

/// Multiply-adds per second of the int8 dot product, if there is AVX-512.
#[cfg(target_arch = "x86_64")]
fn int8_peak(pool: &mut Pool) -> Option<f64> {
    const N: usize = 1 << 21;
    if !Isa::Avx512.supported() {
        return None;
    }
    let n = pool.n_workers();
    // SAFETY: the instruction set was just seen.
    let time = median(7, || pool.run(|_| assert!(std::hint::black_box(unsafe { dot_loop(N) }) != 1)));
    Some((N * 16 * 64 * n) as f64 / time)
}

#[cfg(not(target_arch = "x86_64"))]
fn int8_peak(_pool: &mut Pool) -> Option<f64> {
    None
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

/// in_proj's shape with `tokens`: prefill in GMAC/s, decode over several matrices (larger than the caches) in GB/s.
fn products(isa: Isa, threads: usize, ty: GgmlType, peak: Option<f64>, bandwidth: f64) {
    let (rows, cols, copies) = (16384, 4096, 4);
    let row_block = 64;
    let mut block = vec![0; ty.bytes_for((row_block * cols) as u64).unwrap_or(0) as usize];
    codec(ty).quantize(&noise(row_block * cols), None, &mut block);
    let bytes = block.repeat(rows / row_block * copies);
    let mut c = Compute::new(isa, threads, 512);
    let kind = ActKind::for_weights(ty, false);
    for tokens in [1, 2, 4, 8, 16, 32, 64, 512] {
        let mut acts = Acts::with_capacity(tokens, cols);
        c.norm(&noise(tokens * cols), &vec![1.0; cols], 1e-5, kind, &mut acts);
        let mut out = vec![0.0; tokens * rows];
        let mut copy = 0;
        let time = median(if tokens > 64 { 3 } else { 9 }, || {
            let size = bytes.len() / copies;
            let m =
                MatrixRef::new(ty, rows, cols, &bytes[copy * size..][..size]).expect("the matrix's bytes");
            c.matmul(&m, &acts, &mut out, Then::Store);
            copy = (copy + 1) % copies;
        });
        let (macs, read) = ((rows * cols * tokens) as f64 / time, (bytes.len() / copies) as f64 / time);
        let share = peak.map_or(String::new(), |peak| format!(" ({:.0} % of peak)", 100.0 * macs / peak));
        println!(
            "{:7} {ty:7} {rows}x{cols} x {tokens:3} tokens: {:7.2} ms {:7.1} GMAC/s{share}, {:5.1} GB/s ({:.0} % of reading)",
            isa.name(),
            time * 1e3,
            macs / 1e9,
            read / 1e9,
            100.0 * read / bandwidth
        );
    }
}

/// The part of a layer that is no large product: conv, SiLU, dt, scan, gate (with tiny projections).
fn scan(isa: Isa, threads: usize, tokens: usize) {
    let (d_inner, d_state, d_conv, width) = (8192, 16, 4, 16);
    let zeros = vec![0u8; 2 * d_inner * width * 4];
    let matrix =
        |rows: usize| MatrixRef::new(GgmlType::F32, rows, width, &zeros[..rows * width * 4]).expect("bytes");
    let mut c = Compute::new(isa, threads, tokens);
    let (mut x, mut inner, mut dt) = (
        Acts::with_capacity(tokens, width),
        Acts::with_capacity(tokens, d_inner),
        Acts::with_capacity(tokens, width),
    );
    c.norm(&noise(tokens * width), &[1.0; 16], 1e-5, ActKind::F32, &mut x);
    let mut dt_b_c = noise(tokens * (width + 2 * d_state));
    c.split_dt_b_c(&mut dt_b_c, width, d_state, Some(1e-6), ActKind::F32, &mut dt);
    let (mut conv, mut ssm) = (vec![0.0; d_inner * (d_conv - 1)], vec![0.0; d_inner * d_state]);
    let mut mixer = Mixer::with_capacity(d_inner, tokens);
    let (taps, bias, a) = (noise(d_inner * d_conv), noise(d_inner), vec![-1.0; d_inner * d_state]);
    let layer = InProj { weights: matrix(2 * d_inner), conv_weight: &taps, conv_bias: &bias, d_conv };
    let weights = ScanWeights { dt_proj: matrix(d_inner), dt_bias: &bias, a: &a, d: &bias, d_state };
    let conv_time = median(9, || c.in_proj(&layer, &x, &mut conv, &mut mixer, ActKind::Q8x256, &mut inner))
        / tokens as f64;
    let scan_time =
        median(9, || c.scan(&weights, &dt, &dt_b_c, &mut ssm, &mut mixer, ActKind::Q8x256, &mut inner))
            / tokens as f64;
    let name = isa.name();
    println!(
        "{name:7} {tokens:3} tokens: conv {:6.2} µs, scan {:6.2} µs per token and layer ({:.2} ms per token of 64 layers)",
        conv_time * 1e6,
        scan_time * 1e6,
        (conv_time + scan_time) * 64e3
    );
}

fn main() {
    let mut args = std::env::args().skip(1);
    let threads = args.next().and_then(|n| n.parse().ok()).unwrap_or(2);
    let types: Vec<GgmlType> = args.filter_map(|name| GgmlType::from_name(&name)).collect();
    let types = if types.is_empty() { GgmlType::all().collect() } else { types };
    let mut pool = Pool::new(threads);
    let (bandwidth, peak) = (read_bandwidth(&mut pool), int8_peak(&mut pool));
    println!("{threads} threads: reading {:.1} GB/s", bandwidth / 1e9);
    if let Some(peak) = peak {
        println!("int8 dot product (AVX-512): {:.0} GMAC/s", peak / 1e9);
    }
    drop(pool);
    let isa = Isa::from_env().unwrap_or(Isa::Scalar);
    for tokens in [1, 512] {
        scan(isa, threads, tokens);
    }
    for ty in types {
        products(isa, threads, ty, peak.filter(|_| isa == Isa::Avx512), bandwidth);
    }
}
