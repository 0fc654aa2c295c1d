//! Recipes: which type each tensor of a file gets.
//!
//! The rules are those that llama-quantize applies to the `mamba` architecture: it knows no category for `ssm_*`, so
//! the small, medium and large variants of a K type are the same file. `ssm_s`, `ssm_m` and `ssm_l` are our own: about as
//! large as q3_k, q4_k and q5_k, with bits where measured divergence is, in the projection out of the mixer and in the
//! embedding, and few in `ssm_x` and `ssm_dt`.

use kestrel_formats::arch::{Role, Storage, TensorSpec};
use kestrel_formats::{Error, ErrorKind, GgmlType, Result, WeightType};
use regex::Regex;

/// What a file is called after: the type of most of its tensors, as `--type` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the table below says all there is to say
pub enum FileType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2K,
    Q3KS,
    Q3KM,
    Q3KL,
    Q4KS,
    Q4KM,
    Q5KS,
    Q5KM,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    SsmS,
    SsmM,
    SsmL,
}

struct Row {
    file_type: FileType,
    name: &'static str,
    /// `general.file_type` in GGUF (llama.cpp's `llama_ftype`).
    id: u32,
    base: GgmlType,
}

const fn row(file_type: FileType, name: &'static str, id: u32, base: GgmlType) -> Row {
    Row { file_type, name, id, base }
}

/// In the order of the enum, so that `file_type as usize` indexes it.
#[rustfmt::skip]
const TABLE: [Row; 22] = [
    row(FileType::F32,   "f32",     0, GgmlType::F32),
    row(FileType::F16,   "f16",     1, GgmlType::F16),
    row(FileType::Bf16,  "bf16",   32, GgmlType::Bf16),
    row(FileType::Q8_0,  "q8_0",    7, GgmlType::Q8_0),
    row(FileType::Q4_0,  "q4_0",    2, GgmlType::Q4_0),
    row(FileType::Q4_1,  "q4_1",    3, GgmlType::Q4_1),
    row(FileType::Q5_0,  "q5_0",    8, GgmlType::Q5_0),
    row(FileType::Q5_1,  "q5_1",    9, GgmlType::Q5_1),
    row(FileType::Q2K,   "q2_k",   10, GgmlType::Q2K),
    row(FileType::Q3KS,  "q3_k_s", 11, GgmlType::Q3K),
    row(FileType::Q3KM,  "q3_k_m", 12, GgmlType::Q3K),
    row(FileType::Q3KL,  "q3_k_l", 13, GgmlType::Q3K),
    row(FileType::Q4KS,  "q4_k_s", 14, GgmlType::Q4K),
    row(FileType::Q4KM,  "q4_k_m", 15, GgmlType::Q4K),
    row(FileType::Q5KS,  "q5_k_s", 16, GgmlType::Q5K),
    row(FileType::Q5KM,  "q5_k_m", 17, GgmlType::Q5K),
    row(FileType::Q6K,   "q6_k",   18, GgmlType::Q6K),
    row(FileType::Iq4Nl, "iq4_nl", 25, GgmlType::Iq4Nl),
    row(FileType::Iq4Xs, "iq4_xs", 30, GgmlType::Iq4Xs),
    // Called after the type of `ssm_in`, the largest matrices.
    row(FileType::SsmS,  "ssm_s",  12, GgmlType::Q3K),
    row(FileType::SsmM,  "ssm_m",  30, GgmlType::Iq4Xs),
    row(FileType::SsmL,  "ssm_l",  17, GgmlType::Q5K),
];

/// Where our own recipes differ from their base.
const SSM_S: [(Role, GgmlType); 3] =
    [(Role::SsmOut, GgmlType::Q4K), (Role::TokenEmbd, GgmlType::Q4K), (Role::Output, GgmlType::Q5K)];
const SSM_M: [(Role, GgmlType); 5] = [
    (Role::SsmOut, GgmlType::Q5K),
    (Role::SsmX, GgmlType::Q3K),
    (Role::SsmDt, GgmlType::Q3K),
    (Role::TokenEmbd, GgmlType::Q5K),
    (Role::Output, GgmlType::Q6K),
];
const SSM_L: [(Role, GgmlType); 3] =
    [(Role::SsmOut, GgmlType::Q6K), (Role::SsmDt, GgmlType::Q4K), (Role::Output, GgmlType::Q6K)];

/// Short names that llama-quantize also takes.
const ALIASES: [(&str, FileType); 3] =
    [("q3_k", FileType::Q3KM), ("q4_k", FileType::Q4KM), ("q5_k", FileType::Q5KM)];

impl FileType {
    /// All file types.
    pub fn all() -> impl Iterator<Item = FileType> {
        TABLE.iter().map(|r| r.file_type)
    }

    /// The file type with this name or alias, in either case.
    pub fn parse(name: &str) -> Result<Self> {
        let row = TABLE.iter().find(|r| r.name.eq_ignore_ascii_case(name)).map(|r| r.file_type);
        let alias = || ALIASES.iter().find(|(alias, _)| alias.eq_ignore_ascii_case(name)).map(|(_, t)| *t);
        row.or_else(alias).ok_or_else(|| {
            let names: Vec<_> = TABLE.iter().map(|r| r.name).collect();
            Error::new(ErrorKind::Usage)
                .what("file type")
                .expected(format!("one of {}", names.join(" ")))
                .found(format!("{name:?}"))
        })
    }

    /// The name that [`parse`](Self::parse) takes.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].name
    }

    /// The value of `general.file_type`.
    pub fn id(self) -> u32 {
        TABLE[self as usize].id
    }

    /// The matrices that get another type than [`base`](Self::base), of a recipe of our own; empty for the others.
    pub fn roles(self) -> &'static [(Role, GgmlType)] {
        match self {
            Self::SsmS => &SSM_S,
            Self::SsmM => &SSM_M,
            Self::SsmL => &SSM_L,
            _ => &[],
        }
    }

    /// The type of most tensors.
    pub fn base(self) -> GgmlType {
        TABLE[self as usize].base
    }
}

impl std::fmt::Display for FileType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A file type and what the user wants otherwise for some tensors.
#[derive(Clone, Debug)]
pub struct Recipe {
    file_type: FileType,
    overrides: Vec<(Regex, GgmlType)>,
}

impl Recipe {
    /// A recipe with overrides: patterns searched in the GGUF names of tensors, ignoring case; the first match decides.
    /// Fails with [`ErrorKind::Usage`] on a pattern that is no regular expression.
    pub fn new(file_type: FileType, overrides: &[(String, GgmlType)]) -> Result<Self> {
        let compile = |(pattern, ty): &(String, GgmlType)| {
            let regex = regex::RegexBuilder::new(pattern).case_insensitive(true).build().map_err(|e| {
                Error::new(ErrorKind::Usage)
                    .what(format!("tensor type override {pattern:?}"))
                    .expected("a regular expression")
                    .found(e)
            })?;
            Ok((regex, *ty))
        };
        Ok(Self { file_type, overrides: overrides.iter().map(compile).collect::<Result<_>>()? })
    }

    /// The file type.
    pub fn file_type(&self) -> FileType {
        self.file_type
    }

    /// The type that the overrides give a tensor.
    pub fn override_for(&self, gguf_name: &str) -> Option<GgmlType> {
        self.overrides.iter().find(|(regex, _)| regex.is_match(gguf_name)).map(|(_, ty)| *ty)
    }

    /// The overrides, as given.
    pub fn overrides(&self) -> impl Iterator<Item = (&str, GgmlType)> {
        self.overrides.iter().map(|(regex, ty)| (regex.as_str(), *ty))
    }

    /// The type of a tensor with rows of `cols` weights. `tied` says that the model has no output matrix of its own.
    ///
    /// Overrides act on quantizable tensors of quantized files only. A type whose blocks do not divide a row is replaced
    /// in any case, see [`fitting`].
    pub fn tensor_type(&self, spec: &TensorSpec, gguf_name: &str, cols: usize, tied: bool) -> GgmlType {
        let base = self.file_type.base();
        if spec.storage == Storage::F32 {
            return GgmlType::F32;
        }
        if !base.is_quantized() {
            return base;
        }
        let is_output = spec.role == Role::Output || (tied && spec.role == Role::TokenEmbd);
        let role = if is_output { Role::Output } else { spec.role };
        let by_role = || self.file_type.roles().iter().find(|(r, _)| *r == role).map(|(_, ty)| *ty);
        let chosen = self.override_for(gguf_name).or_else(by_role);
        let default = if !is_output {
            base
        } else if base == GgmlType::Q8_0 || !cols.is_multiple_of(base.block_len()) {
            GgmlType::Q8_0
        } else {
            GgmlType::Q6K
        };
        fitting(chosen.unwrap_or(default), cols)
    }
}

/// What bitsandbytes makes of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bnb {
    /// NF4, FP4 or INT8.
    pub dtype: WeightType,
    /// Weights that share a scale, of a 4-bit type; one of `BNB_BLOCKSIZES`.
    pub blocksize: usize,
    /// Whether the scales are quantized too.
    pub double_quant: bool,
}

impl Bnb {
    /// Whether the library would quantize this tensor: the linear layers, but not the output matrix.
    pub fn quantizes(&self, role: Role) -> bool {
        matches!(role, Role::SsmIn | Role::SsmX | Role::SsmDt | Role::SsmOut)
    }
}

/// `ty`, or what llama-quantize takes instead where its blocks do not divide a row: a type of blocks of 32 with at least
/// as many bits, or else F16.
pub fn fitting(ty: GgmlType, cols: usize) -> GgmlType {
    let fits = |ty: GgmlType| cols.is_multiple_of(ty.block_len());
    if fits(ty) {
        return ty;
    }
    let substitute = match ty {
        GgmlType::Q2K | GgmlType::Q3K => GgmlType::Q4_0,
        GgmlType::Q4K => GgmlType::Q5_0,
        GgmlType::Q5K => GgmlType::Q5_1,
        GgmlType::Q6K => GgmlType::Q8_0,
        GgmlType::Iq4Xs => GgmlType::Iq4Nl,
        _ => GgmlType::F16,
    };
    if fits(substitute) { substitute } else { GgmlType::F16 }
}

#[cfg(test)]
mod tests {
    use kestrel_formats::arch::spec;

    use super::*;

    fn type_of(recipe: &Recipe, role: Role, cols: usize, tied: bool) -> GgmlType {
        let spec = spec(role);
        recipe.tensor_type(spec, &spec.gguf_name(3), cols, tied)
    }

    fn recipe(name: &str) -> Recipe {
        Recipe::new(FileType::parse(name).unwrap(), &[]).unwrap()
    }

    #[test]
    fn the_table_is_in_enum_order_and_names_come_back() {
        for (i, r) in TABLE.iter().enumerate() {
            assert_eq!(r.file_type as usize, i);
            assert_eq!(FileType::parse(&r.name.to_uppercase()).unwrap(), r.file_type);
        }
        assert_eq!(FileType::parse("Q4_K").unwrap(), FileType::Q4KM);
        assert_eq!(FileType::parse("q9").unwrap_err().kind(), ErrorKind::Usage);
    }

    #[test]
    fn the_output_gets_more_bits_and_a_tied_embedding_is_the_output() {
        let r = recipe("q4_k_m");
        assert_eq!(type_of(&r, Role::SsmIn, 4096, false), GgmlType::Q4K);
        assert_eq!(type_of(&r, Role::TokenEmbd, 4096, false), GgmlType::Q4K);
        assert_eq!(type_of(&r, Role::TokenEmbd, 4096, true), GgmlType::Q6K);
        assert_eq!(type_of(&r, Role::Output, 4096, false), GgmlType::Q6K);
        assert_eq!(type_of(&recipe("q8_0"), Role::Output, 4096, false), GgmlType::Q8_0);
        assert_eq!(type_of(&recipe("q4_0"), Role::Output, 4096, false), GgmlType::Q6K);
        assert_eq!(type_of(&recipe("bf16"), Role::Output, 4096, false), GgmlType::Bf16);
    }

    #[test]
    fn our_own_recipes_go_by_role() {
        let r = recipe("ssm_m");
        assert_eq!(type_of(&r, Role::SsmIn, 4096, false), GgmlType::Iq4Xs);
        assert_eq!(type_of(&r, Role::SsmDt, 256, false), GgmlType::Q3K);
        assert_eq!(type_of(&r, Role::SsmDt, 32, false), GgmlType::Q4_0);
        assert_eq!(type_of(&r, Role::TokenEmbd, 4096, false), GgmlType::Q5K);
        assert_eq!(type_of(&r, Role::TokenEmbd, 4096, true), GgmlType::Q6K);
        assert_eq!(type_of(&r, Role::SsmConv1d, 4, false), GgmlType::F32);
    }

    #[test]
    fn overrides_first_match_wins_and_f32_tensors_stay() {
        let rules = [("SSM_x".into(), GgmlType::Q8_0), ("ssm_".into(), GgmlType::Q5K)];
        let r = Recipe::new(FileType::Q4KM, &rules).unwrap();
        assert_eq!(type_of(&r, Role::SsmX, 8192, false), GgmlType::Q8_0);
        assert_eq!(type_of(&r, Role::SsmIn, 4096, false), GgmlType::Q5K);
        assert_eq!(type_of(&r, Role::SsmIn, 128, false), GgmlType::Q5_1);
        assert_eq!(type_of(&r, Role::SsmConv1d, 4, false), GgmlType::F32);
        let r = Recipe::new(FileType::F16, &rules).unwrap();
        assert_eq!(type_of(&r, Role::SsmX, 8192, false), GgmlType::F16);
        assert_eq!(
            Recipe::new(FileType::F16, &[("(".into(), GgmlType::F16)]).unwrap_err().kind(),
            ErrorKind::Usage
        );
    }
}
