//! What the machine can do at most: the figures that a kernel's speed is a share of.
//!
//! A peak is a loop of nothing but the instruction in question, with more independent sums than its latency needs, and
//! a result that is known and checked. Reading is several streams per thread over a buffer that no cache holds. Every
//! figure is the best of several runs: what disturbs a run only makes it slower.

#![allow(unsafe_op_in_unsafe_fn)] // unsafe for the instruction set alone

use super::isa::Isa;
use super::lanes::Lanes;
use super::memory::{LANES, read_ahead};
use super::scalar::Scalar;
use crate::pool::Pool;
use kestrel_formats::{Error, ErrorKind, Result};
use memmap2::MmapMut;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What a machine can do at most with some instruction set and number of threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes per second read from memory.
    pub read_bytes_s: f64,
    /// Multiply-adds of int8 per second.
    pub int8_mac_s: f64,
    /// Multiply-adds of f32 per second.
    pub f32_mac_s: f64,
}

impl Limits {
    /// Measures for some seconds, with the threads of `reading`.
    pub fn measure(isa: Isa, reading: &mut Reading) -> Self {
        let loops = Loops::of(isa);
        Self {
            read_bytes_s: reading.best_bytes_s(),
            int8_mac_s: loops.int8.mac_s(&mut reading.pool),
            f32_mac_s: loops.f32.mac_s(&mut reading.pool),
        }
    }
}

/// Bytes of a buffer that measures memory and not a cache. The largest last-level caches hold some hundred MiB; some
/// keep a part of a buffer that is read round and round although it does not fit, which counts for little at several
/// times their size.
pub const READ_BYTES: usize = 2 << 30;

/// Memory in large pages, where the system has them: with small ones the limit is the page tables. Every page is
/// written, since untouched ones are all the same page.
fn touched(n_bytes: usize) -> Result<MmapMut> {
    let mut buffer = MmapMut::map_anon(n_bytes).map_err(|e| {
        Error::new(ErrorKind::Limit)
            .what("memory to measure its speed")
            .expected(format!("{n_bytes} bytes"))
            .found(e)
    })?;
    #[cfg(target_os = "linux")]
    let _ = buffer.advise(memmap2::Advice::HugePage);
    buffer.fill(1);
    Ok(buffer)
}

/// How long one run takes at least.
const RUN: Duration = Duration::from_millis(30);
/// Runs of which the best counts.
const RUNS: usize = 5;

/// A loop of multiply-adds.
struct Loop {
    /// Runs rounds and returns the sum of all its sums.
    run: unsafe fn(usize) -> f64,
    /// Multiply-adds of a round.
    macs: usize,
    /// What `run` returns after so many multiply-adds.
    expected: fn(usize) -> f64,
}

/// The loops of an instruction set.
struct Loops {
    int8: Loop,
    f32: Loop,
}

impl Loops {
    /// Of `isa`, or of [`Isa::Scalar`] if this machine lacks it.
    fn of(isa: Isa) -> Self {
        match isa {
            _ if !isa.supported() => Self::of(Isa::Scalar),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::AVX2,
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => x86::AMX,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::NEON,
            _ => SCALAR,
        }
    }
}

impl Loop {
    /// An int8 loop whose products are all [`A`]·[`B`].
    const fn int8(run: unsafe fn(usize) -> f64, macs: usize) -> Self {
        Self { run, macs, expected: |macs| (macs as i32).wrapping_mul(A * B).into() }
    }

    /// The loop [`fma`].
    const fn f32<L: Lanes>(run: unsafe fn(usize) -> f64) -> Self {
        Self { run, macs: L::TILE_TOKENS * LANES, expected: |_| (2 * L::TILE_TOKENS * LANES) as f64 }
    }

    /// Multiply-adds per second of all workers together.
    fn mac_s(&self, pool: &mut Pool) -> f64 {
        let mut rounds = 1 << 10;
        let mut time = |rounds: usize| {
            let started = Instant::now();
            pool.run(|_| {
                // SAFETY: `Loops::of` gives a loop only where its instruction set is present.
                let sum = unsafe { (self.run)(black_box(rounds)) };
                assert!(sum == (self.expected)(rounds.wrapping_mul(self.macs)), "a peak loop computes {sum}");
            });
            started.elapsed()
        };
        while time(rounds) < RUN {
            rounds *= 2;
        }
        let best = (0..RUNS).map(|_| time(rounds)).min().unwrap_or(RUN);
        (rounds * self.macs * pool.n_workers()) as f64 / best.as_secs_f64()
    }
}

/// The factors of the int8 loops.
const A: i32 = 3;
const B: i32 = 5;

const SCALAR: Loops = Loops { int8: Loop::int8(scalar_int8, 256), f32: Loop::f32::<Scalar>(fma::<Scalar>) };

/// Products as the compiler makes them.
fn scalar_int8(rounds: usize) -> f64 {
    let (a, b) = ([A as i8; 256], [B as i8; 256]);
    let mut sum = 0i32;
    for _ in 0..rounds {
        let (a, b) = (black_box(&a), black_box(&b));
        sum = a.iter().zip(b).fold(sum, |sum, (&a, &b)| sum.wrapping_add(i32::from(a) * i32::from(b)));
    }
    sum.into()
}

/// x := x/2 + 1 in as many sums as a register tile has; all are 2 after 25 rounds.
#[inline(always)]
unsafe fn fma<L: Lanes>(rounds: usize) -> f64 {
    match L::TILE_TOKENS {
        12 => fma_sums::<L, 12>(rounds),
        6 => fma_sums::<L, 6>(rounds),
        _ => fma_sums::<L, 4>(rounds),
    }
}

#[inline(always)]
unsafe fn fma_sums<L: Lanes, const N: usize>(rounds: usize) -> f64 {
    let (half, one) = (L::splat(black_box(0.5)), L::splat(black_box(1.0)));
    let mut sums = [L::splat(0.0); N];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = sum.mul_add(half, one);
        }
    }
    sums.into_iter().map(|s| f64::from(s.sum())).sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{A, B, Loop, Loops, fma};
    use crate::kernels::x86::{avx2::Avx2, avx512::Avx512};
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    pub const AVX512: Loops =
        Loops { int8: Loop::int8(avx512_int8, 16 * 64), f32: Loop::f32::<Avx512>(avx512_f32) };
    pub const AVX2: Loops = Loops { int8: Loop::int8(avx2_int8, 8 * 32), f32: Loop::f32::<Avx2>(avx2_f32) };

    pub const AMX: Loops = Loops { int8: Loop::int8(amx_int8, 4 * 16 * 16 * 64), ..AVX512 };

    /// tdpbssd of whole tiles, in four sums.
    unsafe fn amx_int8(rounds: usize) -> f64 {
        #[repr(align(64))]
        struct Lines<T, const N: usize>([T; N]);
        let mut config = Lines([0u8; 64]); // palette 1; bytes per row from 16, rows from 48
        config.0[0] = 1;
        for tile in 0..8 {
            (config.0[16 + 2 * tile], config.0[48 + tile]) = (64, 16);
        }
        let (a, b) = (Lines([A as i8; 1024]), Lines([B as i8; 1024]));
        let mut sums = Lines([0i32; 4 * 256]);
        // SAFETY: AMX is present; the configuration is a valid one, and each tile is 16 rows of 64 bytes of the arrays.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{a} + {line}]",
                "tileloadd tmm5, [{a} + {line}]",
                "tileloadd tmm6, [{b} + {line}]",
                "tileloadd tmm7, [{b} + {line}]",
                "2:",
                "tdpbssd tmm0, tmm4, tmm6",
                "tdpbssd tmm1, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                "tilestored [{sums} + {line} + 2048], tmm2",
                "tilestored [{sums} + {line} + 3072], tmm3",
                "tilerelease",
                config = in(reg) &config, a = in(reg) &a, b = in(reg) &b, sums = in(reg) &mut sums,
                line = in(reg) 64usize, rounds = inout(reg) rounds.max(1) => _,
                options(nostack),
            );
        }
        sums.0.into_iter().fold(0i32, i32::wrapping_add).into()
    }

    /// vpdpbusd, whose latency is 4 to 5 on two ports at most, in 16 sums.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
    unsafe fn avx512_int8(rounds: usize) -> f64 {
        let (a, b) = (_mm512_set1_epi8(black_box(A as i8)), _mm512_set1_epi8(black_box(B as i8)));
        let mut sums = [_mm512_setzero_si512(); 16];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        let sum = sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi32(a, b));
        _mm512_reduce_add_epi32(sum).into()
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
    unsafe fn avx512_f32(rounds: usize) -> f64 {
        fma::<Avx512>(rounds)
    }

    /// Eight vpmaddubsw added up in 16 bits, then one vpmaddwd: as much as weights of five bits allow, and more than
    /// those of eight do.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2_int8(rounds: usize) -> f64 {
        let (mut a, b) = (_mm256_set1_epi8(black_box(A as i8)), _mm256_set1_epi8(black_box(B as i8)));
        let ones = _mm256_set1_epi16(1);
        let mut sum = _mm256_setzero_si256();
        for _ in 0..rounds {
            let mut short = [_mm256_setzero_si256(); 2];
            for i in 0..8 {
                // SAFETY: no instruction; the compiler must take the register for changed, or it multiplies once.
                unsafe { asm!("/* {0} */", inout(ymm_reg) a, options(nomem, nostack, preserves_flags)) };
                short[i % 2] = _mm256_add_epi16(short[i % 2], _mm256_maddubs_epi16(a, b));
            }
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(short[0], short[1]), ones));
        }
        let mut sums = [0i32; 8];
        _mm256_storeu_si256(sums.as_mut_ptr().cast(), sum);
        sums.into_iter().fold(0i32, i32::wrapping_add).into()
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2_f32(rounds: usize) -> f64 {
        fma::<Avx2>(rounds)
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::{A, B, Loop, Loops, fma};
    use crate::kernels::neon::Neon;
    use std::arch::aarch64::*;
    use std::arch::asm;
    use std::hint::black_box;

    pub const NEON: Loops = Loops { int8: Loop::int8(int8, 16 * 16), f32: Loop::f32::<Neon>(f32) };

    /// sdot in 16 sums.
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn int8(rounds: usize) -> f64 {
        let (a, b) = (vdupq_n_s8(black_box(A as i8)), vdupq_n_s8(black_box(B as i8)));
        let mut sums = [vdupq_n_s32(0); 16];
        for _ in 0..rounds {
            for sum in &mut sums {
                // SAFETY: the instruction is of this function's set and touches its operands only.
                unsafe {
                    asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) *sum, in(vreg) a, in(vreg) b,
                         options(pure, nomem, nostack, preserves_flags));
                }
            }
        }
        vaddvq_s32(sums.into_iter().fold(vdupq_n_s32(0), |a, b| vaddq_s32(a, b))).into()
    }

    #[target_feature(enable = "neon,dotprod")]
    unsafe fn f32(rounds: usize) -> f64 {
        fma::<Neon>(rounds)
    }
}

/// A line of memory on most machines.
type Line = [u8; 64];

/// Threads that read a buffer together, each its own part.
pub struct Reading {
    pool: Pool,
    buffer: MmapMut,
    /// The best way so far.
    sum_lines: fn(&[Line]) -> u64,
    /// The part that [`Self::go_on`] reads next.
    next: usize,
}

impl Reading {
    /// Parts of the buffer that [`Self::go_on`] reads one after the other.
    const PARTS: usize = 4;

    /// Reads `n_bytes`: [`READ_BYTES`], or less where memory is short. Errors: `Limit` if there is no such memory.
    pub fn new(n_threads: usize, n_bytes: usize) -> Result<Self> {
        let (pool, buffer) = (Pool::new(n_threads), touched(n_bytes)?);
        Ok(Self { pool, buffer, sum_lines: sum_lines::<1, false>, next: 0 })
    }

    /// Bytes of the buffer, all of which lie in memory.
    pub fn n_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Bytes per second at best, in as many streams as serve best, fetched ahead by instructions or not. (On two cores of an
    /// Emerald Rapids the decoding of a model, which fetches, came to more than what reads without.)
    fn best_bytes_s(&mut self) -> f64 {
        let mut best = (Duration::MAX, self.sum_lines);
        let without =
            [sum_lines::<1, false>, sum_lines::<2, false>, sum_lines::<4, false>, sum_lines::<8, false>];
        let ahead = [sum_lines::<1, true>, sum_lines::<2, true>, sum_lines::<4, true>, sum_lines::<8, true>];
        for sum_lines in without.into_iter().chain(ahead) {
            for _ in 0..RUNS.div_ceil(2) {
                let (_, time) = read(&mut self.pool, &self.buffer, sum_lines);
                best = if time < best.0 { (time, sum_lines) } else { best };
            }
        }
        self.sum_lines = best.1;
        self.buffer.len() as f64 / best.0.as_secs_f64().max(1e-9)
    }

    /// Reads parts that no cache has kept for `at_least` so long, and returns their bytes and the time. Called now and then
    /// beside other work, this says how fast memory is meanwhile: where a machine is shared, that changes from second to
    /// second, and whoever works for longer is held up more often, so the two should take equally long.
    pub fn go_on(&mut self, at_least: Duration) -> (usize, Duration) {
        let part_bytes = (self.buffer.len() / Self::PARTS).next_multiple_of(64).max(64);
        let parts: Vec<&[u8]> = self.buffer.chunks(part_bytes).collect();
        let (mut n_bytes, mut time) = (0, Duration::ZERO);
        // This pool's workers and others' look out for work for a while before they sleep, and would take each other's
        // processors meanwhile.
        std::thread::sleep(REST);
        loop {
            self.next = (self.next + 1) % parts.len().max(1);
            let part = parts.get(self.next).copied().unwrap_or_default();
            let (n, t) = read(&mut self.pool, part, self.sum_lines);
            (n_bytes, time) = (n_bytes + n, time + t);
            if time >= at_least {
                break;
            }
        }
        std::thread::sleep(REST);
        (n_bytes, time)
    }

    /// How long two of the threads take to answer each other, there and back: which cores they are on. A virtual machine
    /// is moved between such that share a cache, which answer soonest and share its way to memory, and others, which have
    /// one each. `None` with one thread, or if one was held up for long.
    pub fn answer_time(&mut self) -> Option<Duration> {
        // Looking so often takes some ms at most: with one processor for both an answer takes longer.
        self.answers(500, 1 << 20)
    }

    /// The time of one answer of `n_rounds`, which are 2 or more; `None` with one thread, or if one answer has not come
    /// when it was looked for `patience` times.
    fn answers(&mut self, n_rounds: usize, patience: usize) -> Option<Duration> {
        const NEVER: usize = usize::MAX;
        if self.pool.n_workers() < 2 {
            return None;
        }
        let (question, answer) = (AlonePerLine::default(), AlonePerLine::default());
        let nanos = AtomicU64::new(0);
        let answered = |round: usize| {
            question.0.store(round, Ordering::Release);
            (0..patience).any(|_| answer.0.load(Ordering::Acquire) == round)
        };
        self.pool.run(|w| match w {
            0 => {
                let awake = answered(1);
                let started = Instant::now();
                if awake && (2..=n_rounds).all(answered) {
                    nanos.store(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
                }
                question.0.store(NEVER, Ordering::Release);
            }
            1 => loop {
                match question.0.load(Ordering::Acquire) {
                    NEVER => break,
                    round => answer.0.store(round, Ordering::Release),
                }
            },
            _ => {}
        });
        std::thread::sleep(REST); // as after reading
        let nanos = nanos.into_inner();
        (nanos > 0).then(|| Duration::from_nanos(nanos) / (n_rounds - 1) as u32)
    }
}

/// A number that shares no line of a cache, nor the next one, with others.
#[derive(Default)]
#[repr(align(128))]
struct AlonePerLine(AtomicUsize);

/// Longer than a worker without work stays awake.
const REST: Duration = Duration::from_millis(2);

/// What a worker reads before it looks for more: as with the rows of a product, whoever is held up reads less.
const PIECE_LINES: usize = (2 << 20) / 64;

/// All workers read a buffer, whose bytes are all 1. Returns what they read and the time.
fn read(pool: &mut Pool, buffer: &[u8], sum_lines: fn(&[Line]) -> u64) -> (usize, Duration) {
    let (lines, _) = buffer.as_chunks::<64>();
    let (sum, next) = (AtomicU64::new(0), AtomicUsize::new(0));
    let pieces: Vec<&[Line]> = lines.chunks(PIECE_LINES).collect();
    let started = Instant::now();
    pool.run(|_| {
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            sum.fetch_add(sum_lines(piece), Ordering::Relaxed);
        }
    });
    let time = started.elapsed();
    let words = 8 * lines.len() as u64;
    assert!(sum.into_inner() == words.wrapping_mul(u64::from_ne_bytes([1; 8])), "every line is read once");
    (size_of_val(lines), time)
}

/// The sum of all 8-byte words (wrapping), read in `S` streams; `AHEAD` fetches lines as the products with f32 do.
fn sum_lines<const S: usize, const AHEAD: bool>(lines: &[Line]) -> u64 {
    let stream = lines.len() / S;
    let mut sums = [[0u64; 8]; S];
    let mut add = |s: usize, line: &Line| {
        if AHEAD {
            read_ahead(line.as_ptr().cast());
        }
        for (sum, word) in sums[s].iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    };
    for i in 0..stream {
        for s in 0..S {
            add(s, &lines[s * stream + i]);
        }
    }
    for line in &lines[S * stream..] {
        add(0, line);
    }
    sums.as_flattened().iter().fold(0, |a, &b| a.wrapping_add(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_has_loops_that_compute_what_they_say() {
        // The loops check their results themselves.
        for isa in Isa::all_supported() {
            for n_threads in [1, 2] {
                let mut reading = Reading::new(n_threads, 1 << 20).unwrap();
                let limits = Limits::measure(isa, &mut reading);
                let all = [limits.read_bytes_s, limits.int8_mac_s, limits.f32_mac_s];
                assert!(all.into_iter().all(|x| x.is_finite() && x > 1e6), "{isa:?} {n_threads}: {limits:?}");
            }
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let error = Reading::new(1, usize::MAX / 2).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
    }

    #[test]
    fn two_threads_answer_each_other() {
        assert_eq!(Reading::new(1, 64).unwrap().answers(3, usize::MAX), None);
        let mut reading = Reading::new(2, 64).unwrap();
        // With patience for all that a machine beside other work does to them.
        assert!(reading.answers(3, usize::MAX).unwrap() > Duration::ZERO);
        assert_eq!(reading.answers(3, 0), None);
        // What is asked in earnest may find one of them held up.
        let time = reading.answer_time();
        assert!(
            time.is_none_or(|time| time > Duration::ZERO && time < Duration::from_millis(100)),
            "{time:?}"
        );
    }

    #[test]
    fn parts_are_the_whole_buffer() {
        let mut reading = Reading::new(2, (1 << 20) + 64).unwrap();
        let parts = [(); 8].map(|()| reading.go_on(Duration::ZERO).0);
        assert_eq!(parts[..4].iter().sum::<usize>(), reading.n_bytes());
        assert_eq!(parts[..4], parts[4..]);
        assert_eq!(Reading::new(1, 64).unwrap().go_on(Duration::ZERO).0, 64);
    }

    #[test]
    #[should_panic(expected = "a peak loop computes")]
    fn a_wrong_result_is_found() {
        let wrong = Loop { expected: |_| 1.0, ..SCALAR.int8 };
        wrong.mac_s(&mut Pool::new(1));
    }

    #[test]
    fn streams_read_every_line_once() {
        let lines: Vec<Line> = (0..37).map(|i| [i; 64]).collect();
        let expected = sum_lines::<1, false>(&lines);
        assert_eq!(
            expected,
            (0..37).map(|i| u64::from_ne_bytes([i; 8]).wrapping_mul(8)).fold(0, u64::wrapping_add)
        );
        let without =
            [sum_lines::<2, false>(&lines), sum_lines::<4, false>(&lines), sum_lines::<8, false>(&lines)];
        assert_eq!(without, [expected; 3]);
        assert_eq!([sum_lines::<1, true>(&lines), sum_lines::<4, true>(&lines)], [expected; 2]);
    }
}
