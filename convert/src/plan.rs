//! What a conversion will do, before it does anything.

use crate::input::{Input, Source};
use crate::metadata;
use kestrel_formats::arch::Storage;
use kestrel_formats::calibration::{Calibration, InputProducts};
use kestrel_formats::gguf::{TensorDecl, Value, layout};
use kestrel_formats::imatrix::Imatrix;
use kestrel_formats::{Error, ErrorKind, GgmlType, Result, WeightType};
use kestrel_quant::allocate::{Choice, Goal, allocate};
use kestrel_quant::codec::steps::taken;
use kestrel_quant::isa::Isa;
use kestrel_quant::recipe::{FileType, Recipe};
use std::collections::BTreeMap;

/// What a file must keep to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// Bytes of the file at most.
    Bytes(u64),
    /// Bits of the file per weight at most.
    BitsPerWeight(f64),
    /// Predicted KL divergence at most, in nats.
    Kl(f64),
}

/// How to convert.
pub struct Options {
    /// Which type each tensor gets.
    pub recipe: Recipe,
    /// How much each column of a matrix matters.
    pub imatrix: Option<Imatrix>,
    /// What the inputs of each matrix are like: they are quantized with error feedback.
    pub calibration: Option<Calibration>,
    /// How often codes and scales are gone over after error feedback.
    pub sweeps: usize,
    /// What the file must keep to; needs a calibration, which then chooses the types.
    pub target: Option<Target>,
    /// Worker threads.
    pub threads: usize,
    /// Whether an existing output is replaced.
    pub force: bool,
    /// Whether to go on from what an interrupted run with a calibration left.
    pub resume: bool,
    /// What quantizes. The bytes do not depend on it.
    pub isa: Isa,
}

impl Options {
    /// A conversion to this recipe on all cores, without importance matrix, replacing nothing.
    pub fn new(recipe: Recipe) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            recipe,
            imatrix: None,
            calibration: None,
            sweeps: 0,
            target: None,
            threads,
            force: false,
            resume: false,
            isa: Isa::best(),
        }
    }
}

/// One tensor of the output.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedTensor {
    /// Name in the output.
    pub name: String,
    /// Name in the source.
    pub source_name: String,
    /// Type in the source.
    pub source_dtype: WeightType,
    /// Shape in the output, PyTorch order.
    pub shape: Vec<u64>,
    /// Type in the output.
    pub dtype: GgmlType,
    /// Where its bytes begin in the output.
    pub offset: u64,
    /// How many there are.
    pub n_bytes: u64,
    /// Whether the importance matrix has an entry that is used for it.
    pub weighted: bool,
    /// Whether it is quantized with error feedback.
    pub fed: bool,
    /// Divergence of the model with only this tensor quantized, if the calibration has it.
    pub kl: Option<f64>,
}

/// A complete plan. The same source and options give the same plan.
pub struct Plan {
    /// Every tensor of the output, in its order.
    pub tensors: Vec<PlannedTensor>,
    /// Every key of the output. The digests in `kestrel.source.sha256` are zeros until [`crate::run`] has read the
    /// files; their length is known.
    pub metadata: Vec<(String, Value)>,
    /// Bytes of the whole output.
    pub file_bytes: u64,
    /// Bytes of the source's files, all of which are read once.
    pub source_bytes: u64,
    /// What the user may want to know although nothing is wrong.
    pub warnings: Vec<String>,
    /// Divergence of the file's predictions: the sum over its tensors, if the calibration has all that are quantized.
    pub predicted_kl: Option<f64>,
    pub(crate) input: Input,
}

/// Plans a conversion. Reads headers only, except that an output matrix is compared with the embedding, up to the
/// first difference.
///
/// Errors: `Missing` and `BadShape` from the source, `Inconsistent` if the importance matrix is of another model,
/// `Io`; `Usage` for a target without calibration, or one that no types reach.
pub fn plan(source: &Source, options: &Options) -> Result<Plan> {
    let input = Input::of(source)?;
    let planned = with_types(source, &input, options, &Types::new())?;
    let Some(target) = options.target else { return Ok(planned.plan(input)) };
    let bits =
        8.0 / planned.tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum::<u64>().max(1) as f64;
    let (most, goal) = match target {
        Target::Bytes(n) => (n, Goal::Bytes(n)),
        Target::BitsPerWeight(bpw) => ((bpw / bits) as u64, Goal::Bytes((bpw / bits) as u64)),
        Target::Kl(kl) => (u64::MAX, Goal::Kl(kl)),
    };
    let (names, choices) = choices(&input, options, &planned)?;
    // Of types that were asked for by name.
    let fixed_kl: f64 =
        planned.tensors.iter().filter(|t| !names.contains(&t.name)).filter_map(|t| t.kl).sum();
    let chosen: u64 = planned.tensors.iter().filter(|t| names.contains(&t.name)).map(|t| t.n_bytes).sum();
    let mut rest = planned.file_bytes - chosen; // header, and tensors that are not chosen for
    loop {
        let goal = match goal {
            Goal::Bytes(n) => Goal::Bytes(n.saturating_sub(rest)),
            Goal::Kl(kl) => Goal::Kl(kl - fixed_kl),
        };
        let picked =
            allocate(&choices, goal).ok_or_else(|| out_of_reach(target, &choices, (rest, fixed_kl), bits))?;
        let types =
            names.iter().zip(choices.iter().zip(picked)).map(|(n, (c, i))| (n.clone(), c[i].ty)).collect();
        let planned = with_types(source, &input, options, &types)?;
        // Padding depends on the types.
        match planned.file_bytes.checked_sub(most) {
            None | Some(0) => return Ok(planned.plan(input)),
            Some(excess) => rest += excess,
        }
    }
}

/// Types of tensors by name.
type Types = BTreeMap<String, GgmlType>;

/// A plan before it owns the input.
struct Planned {
    tensors: Vec<PlannedTensor>,
    metadata: Vec<(String, Value)>,
    file_bytes: u64,
    warnings: Vec<String>,
    predicted_kl: Option<f64>,
}

impl Planned {
    fn plan(self, input: Input) -> Plan {
        let Self { tensors, metadata, file_bytes, warnings, predicted_kl } = self;
        let source_bytes = input.files.iter().map(|f| f.n_bytes()).sum();
        Plan { tensors, metadata, file_bytes, source_bytes, warnings, predicted_kl, input }
    }
}

/// The plan with these types in place of the recipe's.
fn with_types(source: &Source, input: &Input, options: &Options, types: &Types) -> Result<Planned> {
    let mut warnings = Vec::new();
    let mut tensors = planned_tensors(input, options, types, &mut warnings)?;
    let predicted_kl = tensors.iter().filter(|t| t.dtype.is_quantized()).map(|t| t.kl).sum();
    let predicted_kl = options.calibration.as_ref().and(predicted_kl);
    let file_type = if types.is_empty() { options.recipe.file_type() } else { of_most_weights(&tensors) };
    let metadata = metadata::pairs(source, input, options, &tensors, (file_type, predicted_kl))?;
    let places = layout(&metadata, &declarations(&tensors))?;
    for (t, (offset, n_bytes)) in tensors.iter_mut().zip(&places.tensors) {
        (t.offset, t.n_bytes) = (*offset, *n_bytes);
    }
    Ok(Planned { tensors, metadata, file_bytes: places.file_bytes, warnings, predicted_kl })
}

/// The file type of the type that most weights have.
fn of_most_weights(tensors: &[PlannedTensor]) -> FileType {
    let weights = |ty: FileType| -> u64 {
        let of_type = tensors.iter().filter(|t| t.dtype == ty.base());
        of_type.map(|t| t.shape.iter().product::<u64>()).sum()
    };
    FileType::all().filter(|ty| ty.roles().is_empty()).max_by_key(|&ty| weights(ty)).unwrap_or(FileType::F32)
}

/// The matrices whose type is free, and what each may become.
fn choices(input: &Input, options: &Options, planned: &Planned) -> Result<(Vec<String>, Vec<Vec<Choice>>)> {
    let usage = |what: &str, expected: &str| Error::new(ErrorKind::Usage).what(what).expected(expected);
    let Some(calibration) = &options.calibration else {
        return Err(usage("--target-size, --target-bpw, --target-kl", "--calibration")
            .hint("kestrel calibrate measures what the types are chosen by"));
    };
    if !options.recipe.file_type().base().is_quantized() {
        return Err(usage("--type", "a quantized type beside --target-size, --target-bpw or --target-kl")
            .found(options.recipe.file_type()));
    }
    let free = input.tensors.iter().zip(&planned.tensors).filter(|(t, _)| {
        t.spec.storage == Storage::Quantizable && options.recipe.override_for(&t.name).is_none()
    });
    let (mut names, mut all) = (Vec::new(), Vec::new());
    for (_, t) in free {
        let Some(divergence) = calibration.divergence(&t.name) else { continue };
        let rows: u64 = t.shape.iter().rev().skip(1).product();
        let cols = t.shape.last().copied().unwrap_or(0);
        let choice = |(ty, kl): (GgmlType, f32)| {
            Some(Choice { ty, n_bytes: rows * ty.bytes_for(cols)?, kl: f64::from(kl) })
        };
        let choices: Vec<_> = divergence.filter_map(choice).collect();
        if !choices.is_empty() {
            names.push(t.name.clone());
            all.push(choices);
        }
    }
    if names.is_empty() {
        return Err(Error::new(ErrorKind::Missing)
            .file(calibration.path())
            .what("divergence of the matrices of this model")
            .hint("kestrel calibrate measures it unless --kl-chunks is 0"));
    }
    Ok((names, all))
}

/// Says how far types can go.
fn out_of_reach(target: Target, choices: &[Vec<Choice>], (rest, rest_kl): (u64, f64), bits: f64) -> Error {
    let smallest = choices.iter().filter_map(|c| c.iter().map(|c| c.n_bytes).min()).sum::<u64>() + rest;
    let best = choices.iter().map(|c| c.iter().map(|c| c.kl).fold(f64::INFINITY, f64::min)).sum::<f64>();
    let best = ((best + rest_kl) * 1e6).ceil() / 1e6;
    let error = |what: &str| Error::new(ErrorKind::Usage).what(what.to_owned());
    match target {
        Target::Bytes(n) => {
            error("--target-size").expected(format!("at least {smallest} bytes, the smallest file")).found(n)
        }
        Target::BitsPerWeight(bpw) => error("--target-bpw")
            .expected(format!("at least {:.3}, the smallest file", smallest as f64 * bits))
            .found(bpw),
        Target::Kl(kl) => {
            error("--target-kl").expected(format!("at least {best:.6}, the best file")).found(kl)
        }
    }
}

fn planned_tensors(
    input: &Input,
    options: &Options,
    types: &Types,
    warnings: &mut Vec<String>,
) -> Result<Vec<PlannedTensor>> {
    let mut tensors = Vec::with_capacity(input.tensors.len());
    let (mut unweighted, mut requantized) = (0, 0);
    for t in &input.tensors {
        let by_recipe = || options.recipe.tensor_type(t.spec, &t.name, t.cols() as usize, input.tied);
        let dtype = types.get(&t.name).copied().unwrap_or_else(by_recipe);
        let quantizes = dtype.is_quantized() && t.dtype != dtype;
        let fed = quantizes && feeds(options, &t.name, t.cols(), dtype)?;
        let calibrated = options.calibration.as_ref().filter(|_| quantizes);
        let kl = calibrated.and_then(|c| c.divergence(&t.name)?.find(|(ty, _)| *ty == dtype));
        let weighted = quantizes && !fed && importance(options, &t.name, t.cols())?.is_some();
        unweighted += usize::from(quantizes && !weighted && t.spec.per_layer());
        requantized += usize::from(t.dtype.is_quantized() && t.dtype != dtype);
        tensors.push(PlannedTensor {
            name: t.name.clone(),
            source_name: t.source_name.clone(),
            source_dtype: t.dtype,
            shape: t.shape.clone(),
            dtype,
            offset: 0,
            n_bytes: 0,
            weighted,
            fed,
            kl: kl.map(|(_, kl)| f64::from(kl)),
        });
    }
    if options.imatrix.is_some() && unweighted > 0 {
        warnings
            .push(format!("the importance matrix has no entry for {unweighted} tensors that are quantized"));
    }
    if options.calibration.is_some() && !tensors.iter().any(|t| t.fed) {
        warnings.push("the calibration has no entry for any tensor that is quantized".to_owned());
    }
    if requantized > 0 {
        warnings.push(format!(
            "{requantized} tensors are quantized already; quantizing again adds to their error"
        ));
    }
    Ok(tensors)
}

/// The importance of each column of a tensor, if the matrix has it.
pub(crate) fn importance<'a>(options: &'a Options, name: &str, cols: u64) -> Result<Option<&'a [f32]>> {
    let Some(imatrix) = &options.imatrix else { return Ok(None) };
    match imatrix.for_tensor(name) {
        Some(weights) if weights.len() as u64 != cols => Err(Error::new(ErrorKind::Inconsistent)
            .file(imatrix.path())
            .what(format!("entry \"{name}\""))
            .expected(format!("{cols} columns, as the tensor has"))
            .found(weights.len())
            .hint("the importance matrix belongs to another model")),
        found => Ok(found),
    }
}

/// Whether a tensor is quantized with error feedback: the calibration has its inputs, in groups of whole blocks.
fn feeds(options: &Options, name: &str, cols: u64, dtype: GgmlType) -> Result<bool> {
    let Some(calibration) = &options.calibration else { return Ok(false) };
    let Some(InputProducts { means, group, .. }) = calibration.products(name) else { return Ok(false) };
    if (means.len() / group) as u64 != cols {
        return Err(Error::new(ErrorKind::Inconsistent)
            .file(calibration.path())
            .what(format!("entry \"{name}\""))
            .expected(format!("{cols} columns, as the tensor has"))
            .found(means.len() / group)
            .hint("the calibration belongs to another model"));
    }
    Ok(taken(dtype).is_some() && group.is_multiple_of(dtype.block_len()))
}

pub(crate) fn declarations(tensors: &[PlannedTensor]) -> Vec<TensorDecl> {
    tensors
        .iter()
        .map(|t| TensorDecl { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() })
        .collect()
}
