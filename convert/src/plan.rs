//! What a conversion will do, before it does anything.

use crate::input::{Input, Source};
use crate::metadata;
use kestrel_formats::gguf::{TensorDecl, Value, layout};
use kestrel_formats::imatrix::Imatrix;
use kestrel_formats::{Error, ErrorKind, GgmlType, Result, WeightType};
use kestrel_quant::isa::Isa;
use kestrel_quant::recipe::Recipe;

/// How to convert.
pub struct Options {
    /// Which type each tensor gets.
    pub recipe: Recipe,
    /// How much each column of a matrix matters.
    pub imatrix: Option<Imatrix>,
    /// Worker threads.
    pub threads: usize,
    /// Whether an existing output is replaced.
    pub force: bool,
    /// What quantizes. The bytes do not depend on it.
    pub isa: Isa,
}

impl Options {
    /// A conversion to this recipe on all cores, without importance matrix, replacing nothing.
    pub fn new(recipe: Recipe) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { recipe, imatrix: None, threads, force: false, isa: Isa::best() }
    }
}

/// One tensor of the output.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    pub(crate) input: Input,
}

/// Plans a conversion. Reads headers only, except that an output matrix is compared with the embedding, up to the
/// first difference.
///
/// Errors: `Missing` and `BadShape` from the source, `Inconsistent` if the importance matrix is of another model,
/// `Io`.
pub fn plan(source: &Source, options: &Options) -> Result<Plan> {
    let input = Input::of(source)?;
    let mut warnings = Vec::new();
    let mut tensors = planned_tensors(&input, options, &mut warnings)?;
    let metadata = metadata::pairs(source, &input, options, &tensors)?;
    let places = layout(&metadata, &declarations(&tensors))?;
    for (t, (offset, n_bytes)) in tensors.iter_mut().zip(&places.tensors) {
        (t.offset, t.n_bytes) = (*offset, *n_bytes);
    }
    let source_bytes = input.files.iter().map(|f| f.n_bytes()).sum();
    Ok(Plan { tensors, metadata, file_bytes: places.file_bytes, source_bytes, warnings, input })
}

fn planned_tensors(
    input: &Input,
    options: &Options,
    warnings: &mut Vec<String>,
) -> Result<Vec<PlannedTensor>> {
    let mut tensors = Vec::with_capacity(input.tensors.len());
    let (mut unweighted, mut requantized) = (0, 0);
    for t in &input.tensors {
        let dtype = options.recipe.tensor_type(t.spec, &t.name, t.cols() as usize, input.tied);
        let quantizes = dtype.is_quantized() && t.dtype != dtype;
        let weighted = quantizes && importance(options, &t.name, t.cols())?.is_some();
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
        });
    }
    if options.imatrix.is_some() && unweighted > 0 {
        warnings
            .push(format!("the importance matrix has no entry for {unweighted} tensors that are quantized"));
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

pub(crate) fn declarations(tensors: &[PlannedTensor]) -> Vec<TensorDecl> {
    tensors
        .iter()
        .map(|t| TensorDecl { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() })
        .collect()
}
