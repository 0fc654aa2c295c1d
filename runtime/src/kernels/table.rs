//! The table of functions of each instruction set.

use super::acts::ActsWriter;
use super::beside;
use super::elementwise::{self, Conv, Scan};
use super::isa::Isa;
use super::matmul::{self, Matmul, MatrixRef};
#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{lanes, scalar};

/// (weights, u, z, dt, state)
type ScanFn = unsafe fn(&Scan<'_>, &mut [f32], &[f32], &[f32], &mut [f32]);

/// The kernels of one instruction set. A value exists only where the instruction set does.
pub struct Kernels {
    isa: Isa,
    pub(super) rms_norm: unsafe fn(&mut [f32], f32),
    pub(super) rms_norm_acts: unsafe fn(&[f32], &[f32], f32, &ActsWriter<'_>, usize),
    pub(super) row_acts: unsafe fn(&[f32], &ActsWriter<'_>, usize),
    pub(super) channel_acts: unsafe fn(&[f32], usize, &ActsWriter<'_>, usize, usize),
    pub(super) conv_silu: unsafe fn(&Conv<'_>, &mut [f32], &mut [f32]),
    pub(super) scan: ScanFn,
    pub(super) f32_matmul: Matmul,
    pub(super) int_matmul: Matmul,
    /// A row of a matrix with scales beside its codes, as Q8_0 blocks.
    pub(super) to_q8_0: unsafe fn(&MatrixRef<'_>, usize, &mut [u8]),
    /// A matrix with scales beside its codes times the int8 activations of few tokens, to the bits of its Q8_0 blocks';
    /// false if its shape is not for that.
    pub(super) beside_rows: Option<unsafe fn(&matmul::Job<'_>, &mut matmul::Scratch) -> bool>,
    exp: unsafe fn(&mut [f32]),
    silu: unsafe fn(&mut [f32]),
    softplus: unsafe fn(&mut [f32]),
}

/// The kernels of `isa`; those of [`Isa::Scalar`] if this machine lacks it.
pub fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        _ if !isa.supported() => &SCALAR,
        Isa::ScalarInt8 => &SCALAR_INT8,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &AVX2,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => &AMX,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => &NEON,
        _ => &SCALAR,
    }
}

impl Kernels {
    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// e^x of every number; see the bounds in `lanes.rs`.
    pub fn exp(&self, x: &mut [f32]) {
        // SAFETY: `kernels` gives a table only where its instruction set is present.
        unsafe { (self.exp)(x) }
    }

    /// x·sigmoid(x) of every number.
    pub fn silu(&self, x: &mut [f32]) {
        // SAFETY: as in `exp`.
        unsafe { (self.silu)(x) }
    }

    /// log(1 + e^x) of every number.
    pub fn softplus(&self, x: &mut [f32]) {
        // SAFETY: as in `exp`.
        unsafe { (self.softplus)(x) }
    }

    /// x / rms(x), without weights.
    pub fn rms_norm(&self, x: &mut [f32], eps: f32) {
        // SAFETY: as in `exp`.
        unsafe { (self.rms_norm)(x, eps) }
    }
}

/// Compiles the bodies that are generic over `Lanes` for one instruction set and lists them in a table.
macro_rules! kernels {
    ($table:ident, $isa:expr, $lanes:ty, $int_matmul:path, $beside_rows:expr $(, #[$feature:meta])?) => {
        static $table: Kernels = {
            $(#[$feature])?
            unsafe fn rms_norm(x: &mut [f32], eps: f32) {
                // SAFETY: the table's promise, here and below.
                unsafe { elementwise::rms_norm::<$lanes>(x, eps) }
            }
            $(#[$feature])?
            unsafe fn rms_norm_acts(x: &[f32], weight: &[f32], eps: f32, to: &ActsWriter<'_>, t: usize) {
                // SAFETY: as above.
                unsafe { elementwise::rms_norm_acts::<$lanes>(x, weight, eps, to, t) }
            }
            $(#[$feature])?
            unsafe fn row_acts(x: &[f32], to: &ActsWriter<'_>, t: usize) {
                // SAFETY: as above.
                unsafe { elementwise::row_acts::<$lanes>(x, to, t) }
            }
            $(#[$feature])?
            unsafe fn channel_acts(x: &[f32], n_tokens: usize, to: &ActsWriter<'_>, col: usize, n: usize) {
                // SAFETY: as above.
                unsafe { elementwise::channel_acts::<$lanes>(x, n_tokens, to, col, n) }
            }
            $(#[$feature])?
            unsafe fn conv_silu(conv: &Conv<'_>, x: &mut [f32], state: &mut [f32]) {
                // SAFETY: as above.
                unsafe { elementwise::conv_silu::<$lanes>(conv, x, state) }
            }
            $(#[$feature])?
            unsafe fn scan(s: &Scan<'_>, u: &mut [f32], z: &[f32], dt: &[f32], state: &mut [f32]) {
                // SAFETY: as above.
                unsafe { elementwise::scan::<$lanes>(s, u, z, dt, state) }
            }
            $(#[$feature])?
            unsafe fn f32_matmul(job: &matmul::Job<'_>, scratch: &mut matmul::Scratch) {
                // SAFETY: as above.
                unsafe { matmul::f32_matmul::<$lanes>(job, scratch) }
            }
            $(#[$feature])?
            unsafe fn to_q8_0(weights: &MatrixRef<'_>, row: usize, out: &mut [u8]) {
                // SAFETY: as above.
                unsafe { beside::to_q8_0::<$lanes>(weights, row, out) }
            }
            $(#[$feature])?
            unsafe fn exp(x: &mut [f32]) {
                // SAFETY: as above.
                unsafe { elementwise::map::<$lanes>(x, |v| lanes::exp(v)) }
            }
            $(#[$feature])?
            unsafe fn silu(x: &mut [f32]) {
                // SAFETY: as above.
                unsafe { elementwise::map::<$lanes>(x, |v| lanes::silu(v)) }
            }
            $(#[$feature])?
            unsafe fn softplus(x: &mut [f32]) {
                // SAFETY: as above.
                unsafe { elementwise::map::<$lanes>(x, |v| lanes::softplus(v)) }
            }
            Kernels {
                isa: $isa,
                rms_norm,
                rms_norm_acts,
                row_acts,
                channel_acts,
                conv_silu,
                scan,
                f32_matmul,
                int_matmul: $int_matmul,
                to_q8_0,
                beside_rows: $beside_rows,
                exp,
                silu,
                softplus,
            }
        };
    };
}

kernels!(SCALAR, Isa::Scalar, scalar::Scalar, scalar::int_matmul, None);
kernels!(SCALAR_INT8, Isa::ScalarInt8, scalar::Scalar, scalar::int8_matmul, None);
#[cfg(target_arch = "x86_64")]
kernels!(
    AVX2,
    Isa::Avx2,
    x86::avx2::Avx2,
    x86::avx2::int_matmul,
    Some(x86::avx2::beside_rows),
    #[target_feature(enable = "avx2,fma,f16c")]
);
#[cfg(target_arch = "x86_64")]
kernels!(
    AVX512,
    Isa::Avx512,
    x86::avx512::Avx512,
    x86::avx512::int_matmul,
    Some(x86::avx512::beside_rows),
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
);
#[cfg(target_arch = "x86_64")]
kernels!(
    AMX,
    Isa::Amx,
    x86::avx512::Avx512,
    x86::amx::int_matmul,
    Some(x86::avx512::beside_rows),
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni")]
);
#[cfg(target_arch = "aarch64")]
kernels!(
    NEON,
    Isa::Neon,
    neon::Neon,
    neon::int_matmul,
    None,
    #[target_feature(enable = "neon,dotprod")]
);
