//! Speed of each kernel on the 7B's shapes, as a share of what the machine can do, measured in the same run.
//!
//!     cargo bench -p kestrel-runtime -- [filter]
//!
//! The matrix has a quarter of ssm_in's rows. Up to four tokens the weights are what costs: several copies of the
//! matrix, together larger than a cache, are used in turn, and the figure is their bytes. From eight tokens on it is
//! multiply-adds. `KESTREL_ISA` forces an instruction set and `KESTREL_BENCH_THREADS` a number of threads.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

use criterion::measurement::{Measurement, ValueFormatter};
use criterion::{BenchmarkId, Criterion, Throughput};
use kestrel_formats::GgmlType;
use kestrel_formats::arch::{Arch, HyperParams};
use kestrel_quant::codec;
use kestrel_runtime::State;
use kestrel_runtime::kernels::peak::{Limits, READ_BYTES, Reading};
use kestrel_runtime::kernels::{
    ActKind, Acts, ByChannel, Compute, InProj, Isa, MatrixRef, Mixer, ScanWeights, Segment, Then,
};
use kestrel_runtime::pool::Pool;
use kestrel_runtime::state::StateShape;
use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const D_MODEL: usize = 4096;
const D_INNER: usize = 8192;
const D_STATE: usize = 16;
const D_CONV: usize = 4;
const DT_RANK: usize = 256;
const ROWS: usize = 4096;

/// Operations on f32 of one exponential: see `lanes.rs`.
const EXP: usize = 14;

/// Wall-clock time, and throughput as a share of one of the machine's limits.
#[derive(Clone, Copy)]
enum Speed {
    /// Bytes, of the rate of reading memory.
    Read,
    /// Multiply-adds, of the int8 peak.
    Int8,
    /// Operations on f32, of the peak of f32 multiply-adds.
    F32,
}

impl Speed {
    /// Name and limit, per nanosecond.
    fn limit(self) -> (&'static str, f64) {
        static LIMITS: OnceLock<Limits> = OnceLock::new();
        let limits = LIMITS.get_or_init(|| {
            let mut reading = Reading::new(n_threads(), READ_BYTES).expect("memory to measure");
            Limits::measure(isa(), &mut reading)
        });
        match self {
            Self::Read => ("GB/s", limits.read_bytes_s / 1e9),
            Self::Int8 => ("GMAC/s", limits.int8_mac_s / 1e9),
            Self::F32 => ("Gop/s", limits.f32_mac_s / 1e9),
        }
    }
}

impl Measurement for Speed {
    type Intermediate = Instant;
    type Value = Duration;

    fn start(&self) -> Instant {
        Instant::now()
    }

    fn end(&self, start: Instant) -> Duration {
        start.elapsed()
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        self
    }
}

impl ValueFormatter for Speed {
    fn scale_values(&self, _typical: f64, values: &mut [f64]) -> &'static str {
        values.iter_mut().for_each(|ns| *ns /= 1e3);
        "µs"
    }

    fn scale_throughputs(&self, typical: f64, amount: &Throughput, values: &mut [f64]) -> &'static str {
        let Throughput::Elements(amount) = *amount else { unreachable!("every benchmark counts elements") };
        let (unit, limit) = self.limit();
        values.iter_mut().for_each(|ns| *ns = amount as f64 / *ns);
        let share = 100.0 * amount as f64 / typical / limit;
        format!("{unit} ({share:.0} % of {limit:.0})").leak()
    }

    fn scale_for_machines(&self, _values: &mut [f64]) -> &'static str {
        "ns"
    }
}

fn isa() -> Isa {
    Isa::from_env().expect("KESTREL_ISA is an instruction set of this machine")
}

fn n_threads() -> usize {
    let forced = std::env::var("KESTREL_BENCH_THREADS").ok();
    let forced = forced.map(|n| n.parse().expect("KESTREL_BENCH_THREADS is a number"));
    forced.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Each benchmark runs once, to see that it works.
fn only_a_test() -> bool {
    !std::env::args().any(|a| a == "--bench") || std::env::args().any(|a| a == "--test")
}

fn criterion(speed: Speed) -> Criterion<Speed> {
    Criterion::default()
        .with_measurement(speed)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .sample_size(10)
        .without_plots()
        .configure_from_args()
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

/// Copies of a matrix (ROWS, D_MODEL) of `ty`; the rows repeat.
struct Matrices {
    ty: GgmlType,
    bytes: Vec<u8>,
    n_copies: usize,
}

impl Matrices {
    fn new(ty: GgmlType) -> Self {
        const DISTINCT: usize = 16;
        let mut rows = vec![0; ty.bytes_for((DISTINCT * D_MODEL) as u64).expect("whole blocks") as usize];
        codec(ty).quantize(&noise(DISTINCT * D_MODEL), None, &mut rows);
        let n_bytes = rows.len() * (ROWS / DISTINCT);
        let n_copies = if only_a_test() { 2 } else { READ_BYTES.div_ceil(n_bytes) };
        Self { ty, bytes: rows.repeat(ROWS / DISTINCT * n_copies), n_copies }
    }

    fn n_bytes(&self) -> usize {
        self.bytes.len() / self.n_copies
    }

    fn copy(&self, i: usize) -> MatrixRef<'_> {
        let bytes = &self.bytes[i % self.n_copies * self.n_bytes()..][..self.n_bytes()];
        MatrixRef::new(self.ty, ROWS, D_MODEL, bytes).expect("the bytes of a matrix")
    }
}

fn products(read: &mut Criterion<Speed>, int8: &mut Criterion<Speed>, f32: &mut Criterion<Speed>) {
    let mut compute = Compute::new(isa(), n_threads(), 512);
    for ty in GgmlType::all() {
        let matrices = Matrices::new(ty);
        let kind = ActKind::for_weights(ty, false);
        for tokens in [1, 4, 8, 32, 512] {
            let mut acts = Acts::with_capacity(tokens, D_MODEL);
            compute.norm(&noise(tokens * D_MODEL), &[1.0; D_MODEL], 1e-5, kind, &mut acts);
            let mut out = vec![0.0; tokens * ROWS];
            let (criterion, amount) = match (tokens, kind) {
                (1..=4, _) => (&mut *read, matrices.n_bytes()),
                (_, ActKind::F32) => (&mut *f32, ROWS * D_MODEL * tokens),
                _ => (&mut *int8, ROWS * D_MODEL * tokens),
            };
            let mut i = 0;
            let mut group = criterion.benchmark_group("matmul");
            group.throughput(Throughput::Elements(amount as u64));
            group.bench_function(BenchmarkId::new(ty.name(), tokens), |b| {
                b.iter(|| {
                    i += 1;
                    compute.matmul(&matrices.copy(i), &acts, &mut out, Then::Store);
                });
            });
        }
    }
}

/// What of a layer is no large product, with projections of 16 columns where one cannot be left out.
fn mixer(criterion: &mut Criterion<Speed>) {
    const WIDTH: usize = 16;
    let kind = ActKind::Q8x256;
    let zeros = vec![0u8; 2 * D_INNER * WIDTH * 4];
    let matrix =
        |rows: usize| MatrixRef::new(GgmlType::F32, rows, WIDTH, &zeros[..rows * WIDTH * 4]).expect("bytes");
    let (taps, bias, a) = (noise(D_INNER * D_CONV), noise(D_INNER), vec![-1.0; D_INNER * D_STATE]);
    let (taps, a) = (ByChannel::new(&taps, D_CONV), ByChannel::new(&a, D_STATE));
    for tokens in [1, 32, 512] {
        let mut compute = Compute::new(isa(), n_threads(), tokens);
        let acts = |cols| Acts::with_capacity(tokens, cols);
        let (mut x, mut inner, mut dt) = (acts(WIDTH), acts(D_INNER), acts(WIDTH));
        compute.norm(&noise(tokens * WIDTH), &[1.0; WIDTH], 1e-5, ActKind::F32, &mut x);
        let mut dt_b_c = noise(tokens * (WIDTH + 2 * D_STATE));
        compute.split_dt_b_c(&mut dt_b_c, WIDTH, D_STATE, Some(1e-6), ActKind::F32, &mut dt);
        let shape = HyperParams {
            arch: Arch::FalconMamba,
            d_model: D_MODEL,
            d_inner: D_INNER,
            d_state: D_STATE,
            d_conv: D_CONV,
            dt_rank: DT_RANK,
            n_layer: 1,
            vocab_size: 1,
            layer_norm_epsilon: 1e-5,
            mixer_rms_eps: 1e-6,
        };
        let mut state = State::new(StateShape::new(&shape, 0));
        let of = [Segment { state: &mut state, n_tokens: tokens }];
        let mut mixer = Mixer::with_capacity(D_INNER, tokens);
        let in_proj =
            InProj { weights: matrix(2 * D_INNER), conv_weight: &taps, conv_bias: &bias, d_conv: D_CONV };
        let scan =
            ScanWeights { dt_proj: matrix(D_INNER), dt_bias: &bias, a: &a, d: &bias, d_state: D_STATE };
        let mut group = criterion.benchmark_group("mixer");

        // The projection's multiply-adds, the taps, and SiLU: an exponential and three more.
        let ops = tokens * D_INNER * (2 * WIDTH + D_CONV + EXP + 3);
        group.throughput(Throughput::Elements(ops as u64));
        group.bench_function(BenchmarkId::new("conv", tokens), |b| {
            b.iter(|| compute.in_proj(&in_proj, &x, &of, 0, &mut mixer, kind, &mut inner));
        });
        // Per state number an exponential and four more; per channel the projection, softplus and the gate.
        let ops = tokens * D_INNER * (D_STATE * (EXP + 4) + WIDTH + 2 * EXP + 15);
        group.throughput(Throughput::Elements(ops as u64));
        group.bench_function(BenchmarkId::new("scan", tokens), |b| {
            // It leaves its output where u was, so u is made anew each time: fed with themselves, the numbers would
            // fade to denormal ones, which are slow.
            b.iter_custom(|n| {
                let mut time = Duration::ZERO;
                for _ in 0..n {
                    compute.in_proj(&in_proj, &x, &of, 0, &mut mixer, kind, &mut inner);
                    let start = Instant::now();
                    compute.scan(&scan, &dt, &dt_b_c, &of, 0, &mut mixer, kind, &mut inner);
                    time += start.elapsed();
                }
                time
            });
        });
    }
}

/// Norms and the quantization of activations: f32 that are read, mostly from a cache.
fn rows(criterion: &mut Criterion<Speed>) {
    const WIDTH: usize = DT_RANK + 2 * D_STATE;
    for tokens in [1, 512] {
        let mut compute = Compute::new(isa(), n_threads(), tokens);
        let (x, mut dt_b_c) = (noise(tokens * D_MODEL), noise(tokens * WIDTH));
        let mut acts = Acts::with_capacity(tokens, D_MODEL);
        let mut group = criterion.benchmark_group("rows");
        for (name, kind) in
            [("f32", ActKind::F32), ("int8 x 32", ActKind::Q8x32), ("int8 x 256", ActKind::Q8x256)]
        {
            group.throughput(Throughput::Elements((4 * tokens * D_MODEL) as u64));
            group.bench_function(BenchmarkId::new(format!("norm to {name}"), tokens), |b| {
                b.iter(|| compute.norm(&x, &[1.0; D_MODEL], 1e-5, kind, &mut acts));
            });
            group.throughput(Throughput::Elements((4 * tokens * WIDTH) as u64));
            group.bench_function(BenchmarkId::new(format!("dt, B, C to {name}"), tokens), |b| {
                b.iter(|| compute.split_dt_b_c(&mut dt_b_c, DT_RANK, D_STATE, Some(1e-6), kind, &mut acts));
            });
        }
    }
}

/// Work that takes no time, given to all threads and waited for: what each of a token's products and scans costs beside
/// itself. The second is rayon's way of it, from within its pool.
fn fork_and_join(criterion: &mut Criterion<Speed>) {
    let mut group = criterion.benchmark_group("fork and join");
    let mut pool = Pool::new(n_threads());
    group.bench_function("pool", |b| b.iter(|| pool.run(|worker| _ = black_box(worker))));
    let rayon = rayon::ThreadPoolBuilder::new().num_threads(n_threads()).build().expect("threads");
    group.bench_function("rayon", |b| {
        rayon.install(|| b.iter(|| rayon::broadcast(|context| _ = black_box(context.index()))));
    });
}

fn main() {
    let [mut read, mut int8, mut f32] = [Speed::Read, Speed::Int8, Speed::F32].map(criterion);
    products(&mut read, &mut int8, &mut f32);
    mixer(&mut f32);
    rows(&mut read);
    fork_and_join(&mut read);
    read.final_summary();
}
