//! Which instruction set the kernels use: found out at run time, never a compile flag.

use kestrel_formats::{Error, ErrorKind, Result};

/// An instruction set that has kernels here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust; complete, and the truth that the others are tested against.
    Scalar,
    /// The same with Q4_K as int8 for many tokens (`kernels/as_int8.rs`): the truth of those that do so.
    ScalarInt8,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL, VBMI and VNNI.
    Avx512,
    /// AMX with int8, for many tokens; else as [`Self::Avx512`].
    Amx,
    /// NEON with the dot-product extension.
    Neon,
}

/// The environment variable that forces an instruction set.
const VARIABLE: &str = "KESTREL_ISA";

impl Isa {
    const ALL: [Isa; 6] = [Isa::Amx, Isa::Avx512, Isa::Neon, Isa::Avx2, Isa::Scalar, Isa::ScalarInt8]; // best first

    /// The fastest one that this machine has.
    pub fn best() -> Self {
        Self::ALL.into_iter().find(|isa| isa.supported()).unwrap_or(Self::Scalar)
    }

    /// Every one that this machine has, the fastest first.
    pub fn all_supported() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.supported()).collect()
    }

    /// Its name in `KESTREL_ISA` and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::ScalarInt8 => "scalar_int8",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
            Self::Neon => "neon",
        }
    }

    /// Plain Rust that gives the same bits.
    pub fn truth(self) -> Self {
        match self {
            Self::Scalar | Self::Avx2 | Self::Neon => Self::Scalar,
            Self::ScalarInt8 | Self::Avx512 | Self::Amx => Self::ScalarInt8,
        }
    }

    /// Whether this machine has it.
    pub fn supported(self) -> bool {
        match self {
            Self::Scalar | Self::ScalarInt8 => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("gfni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512.supported() && super::x86::amx::available(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => {
                std::arch::is_aarch64_feature_detected!("neon")
                    && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            #[allow(unreachable_patterns)] // the instruction sets of other machines
            _ => false,
        }
    }

    /// What `KESTREL_ISA` asks for, or the best. Errors: `Usage` for an unknown name or one this machine lacks.
    pub fn from_env() -> Result<Self> {
        match std::env::var_os(VARIABLE) {
            None => Ok(Self::best()),
            Some(name) => Self::from_name(&name.to_string_lossy()),
        }
    }

    /// The one of this name. Errors: `Usage` for an unknown name or one that this machine lacks.
    pub fn from_name(name: &str) -> Result<Self> {
        let available = || Self::all_supported().iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ");
        Self::ALL.into_iter().find(|isa| isa.name() == name && isa.supported()).ok_or_else(|| {
            Error::new(ErrorKind::Usage)
                .what(VARIABLE)
                .expected(format!("an instruction set of this machine: {}", available()))
                .found(format!("\"{name}\""))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Isa;
    use kestrel_formats::ErrorKind;

    #[test]
    fn names_select_and_unknown_ones_are_usage_errors() {
        for isa in Isa::all_supported() {
            assert_eq!(Isa::from_name(isa.name()).unwrap(), isa);
        }
        let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
        for name in ["", "AVX2", "sse", foreign] {
            let error = Isa::from_name(name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(error.to_string().contains("scalar"), "{error}");
        }
    }
}
