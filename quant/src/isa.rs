//! The instruction sets that the codecs are compiled for, and the choice between them at run time.
//!
//! There is one source, plain loops over arrays of lanes; compiled with the features of a set, each operation on a lane
//! array becomes one vector instruction. What loops cannot say is in `scale_search::vectors`, for which the number of lanes
//! names the set. Rust neither fuses nor reorders float operations, so that every set gives the
//! same bits.

/// An instruction set that the codecs are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What every processor of the target has: SSE2 on x86-64, NEON on AArch64.
    Baseline,
    /// AVX2 and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// Something that is worth compiling for each instruction set.
pub(crate) trait Work {
    /// Does it. To be marked `#[inline(always)]`, as must be what it calls: only what ends up inside the function with
    /// the features is compiled with them. `L` is the number of lanes that suits the set.
    fn run<const L: usize>(self);
}

impl Isa {
    /// Every set, the fastest first.
    pub const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Baseline];

    /// The fastest one that this machine has.
    pub fn best() -> Self {
        Self::ALL.into_iter().find(|isa| isa.supported()).unwrap_or(Self::Baseline)
    }

    /// Whether this machine has it.
    pub fn supported(self) -> bool {
        match self {
            Self::Baseline => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Does the work with this set. Panics if the machine lacks it.
    pub(crate) fn run(self, work: impl Work) {
        assert!(self.supported(), "{self:?} on a machine that lacks it");
        match self {
            Self::Baseline => work.run::<BASELINE>(),
            // SAFETY: the machine has the features; that was asserted above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512(work) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not supported"),
        }
    }
}

/// Lanes of [`Isa::Baseline`]; on x86-64, where the number says what there is, SSE2's.
const BASELINE: usize = if cfg!(target_arch = "x86_64") { 4 } else { 8 };

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn avx2(work: impl Work) {
    work.run::<8>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512(work: impl Work) {
    work.run::<16>();
}
