//! Opening a model: a GGUF file is mapped and executed as it lies; a checkpoint folder is executed as it lies too,
//! or quantized in memory.

use crate::matrix::{Bytes, Floats, Matrix};
use crate::model::{Model, WeightSource};
use kestrel_formats::arch::{self, HyperParams, Role, Storage, TensorSpec, Transform};
use kestrel_formats::checkpoint::Checkpoint;
use kestrel_formats::gguf::{self, Gguf};
use kestrel_formats::tokenizer::TokenizerData;
use kestrel_formats::{Error, ErrorKind, GgmlType, Result};
use kestrel_quant::recipe::{FileType, Recipe};
use kestrel_quant::{codec, transform};
use rayon::prelude::*;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// How to open a model.
#[derive(Default)]
pub struct LoadOptions<'a> {
    /// Quantize a checkpoint folder's matrices in memory to what this file type gives them.
    pub quantize: Option<FileType>,
    /// Called with (bytes read, bytes in all) while quantizing.
    pub progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
}

impl Model {
    /// Opens a GGUF file or a Hugging Face folder. Errors: whatever the readers find; `Usage` if a GGUF is to be
    /// quantized at load.
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        if path.is_dir() {
            return Self::from_checkpoint(&Checkpoint::open(path)?, options);
        }
        if options.quantize.is_some() {
            return Err(Error::new(ErrorKind::Usage)
                .file(path)
                .what("quantizing at load")
                .expected("a Hugging Face folder")
                .found("a file")
                .hint("a GGUF runs as it is; `kestrel quantize` makes another type of it"));
        }
        Self::from_gguf(&Gguf::open(path)?)
    }

    /// A model that executes the file's own bytes.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let facts = gguf::model_of(file)?;
        let tokenizer = TokenizerData::from_gguf(file)?;
        let mut warnings = [file.warnings(), &facts.warnings].concat();
        warnings.extend(tokenizer.iter().flat_map(|t| &t.warnings).cloned());
        warnings.extend(file_type_warning(file));
        let source = GgufSource { file };
        Ok(Self::build(file.path(), facts.hparams, facts.tied, tokenizer, &source)?.with_warnings(warnings))
    }

    /// A model that executes the shards' own bytes, or a quantized copy in memory.
    pub fn from_checkpoint(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self> {
        let hparams = *checkpoint.hyperparams();
        let source = CheckpointSource {
            checkpoint,
            hparams,
            recipe: options.quantize.map(|ty| Recipe::new(ty, &[])).transpose()?,
            progress: options.progress,
            n_read: AtomicU64::new(0),
            n_total: checkpoint.tensors().iter().map(|t| t.n_bytes).sum(),
        };
        let tokenizer = checkpoint.tokenizer().cloned();
        let model = Self::build(checkpoint.dir(), hparams, checkpoint.tied(), tokenizer, &source)?;
        Ok(model.with_warnings(checkpoint.warnings().to_vec()))
    }
}

/// If `general.file_type` names a type that no tensor has, although some could.
fn file_type_warning(file: &Gguf) -> Option<String> {
    let id = file.metadata().u32("general.file_type").ok()??;
    let named = FileType::all().find(|t| t.id() == id)?;
    let fits = |t: &gguf::TensorInfo| {
        t.shape.len() == 2 && t.shape.last().is_some_and(|&cols| named.base().bytes_for(cols).is_some())
    };
    let (some_fits, some_has) =
        (file.tensors().iter().any(fits), file.tensors().iter().any(|t| t.dtype == named.base()));
    (some_fits && !some_has)
        .then(|| format!("general.file_type is {} but no tensor is {}", named.name(), named.base()))
}

/// (rows, cols) of a matrix in the table.
fn matrix_shape(spec: &TensorSpec, h: &HyperParams) -> (usize, usize) {
    let shape = (spec.shape)(h);
    debug_assert!(spec.storage == Storage::Quantizable && shape.len() == 2);
    (shape[0], shape[1])
}

struct GgufSource<'a> {
    file: &'a Gguf,
}

impl GgufSource<'_> {
    fn find(&self, role: Role, layer: usize) -> Result<&gguf::TensorInfo> {
        let name = arch::spec(role).gguf_name(layer);
        match self.file.tensor(&name) {
            Some(view) => Ok(view.info),
            None => {
                Err(Error::new(ErrorKind::Missing).file(self.file.path()).what(format!("tensor \"{name}\"")))
            }
        }
    }
}

impl WeightSource for GgufSource<'_> {
    fn matrix(&self, role: Role, layer: usize) -> Result<Matrix> {
        let info = self.find(role, layer)?;
        let (map, range) = self.file.map_of(info);
        // Two dimensions and their sizes were checked against the table by `hyperparams_from_gguf`.
        let [rows, cols] = [0, 1].map(|i| info.shape.get(i).copied().unwrap_or(1) as usize);
        Matrix::new(info.dtype, rows, cols, Bytes::Mapped(map.clone(), range))
    }

    fn floats(&self, role: Role, layer: usize) -> Result<Floats> {
        let (map, range) = self.file.map_of(self.find(role, layer)?);
        Ok(Floats::mapped(map, range))
    }
}

struct CheckpointSource<'a> {
    checkpoint: &'a Checkpoint,
    hparams: HyperParams,
    recipe: Option<Recipe>,
    progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    n_read: AtomicU64,
    n_total: u64,
}

/// Rows read and quantized at a time hold about this many weights.
const CHUNK_WEIGHTS: usize = 1 << 18;

impl CheckpointSource<'_> {
    fn find(&self, role: Role, layer: usize) -> Result<&kestrel_formats::checkpoint::SourceTensor> {
        let name = arch::spec(role).hf_name(layer);
        self.checkpoint.tensor(&name).ok_or_else(|| {
            Error::new(ErrorKind::Missing).file(self.checkpoint.dir()).what(format!("tensor \"{name}\""))
        })
    }

    /// Reads weights `first..first + out.len()` of a tensor as f32.
    fn read_f32(
        &self,
        t: &kestrel_formats::checkpoint::SourceTensor,
        first: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let size = t.dtype.block_bytes();
        let mut bytes = vec![0; out.len() * size];
        self.checkpoint.read(t, (first * size) as u64, &mut bytes)?;
        transform::to_f32(t.dtype, &bytes, out);
        if let Some(progress) = self.progress {
            let n_bytes = bytes.len() as u64;
            progress(self.n_read.fetch_add(n_bytes, Ordering::Relaxed) + n_bytes, self.n_total);
        }
        Ok(())
    }

    /// The matrix quantized to `dtype`, rows in parallel, a bounded number of them in f32 at a time.
    fn quantized(&self, role: Role, layer: usize, dtype: GgmlType) -> Result<Matrix> {
        let tensor = self.find(role, layer)?;
        let (rows, cols) = matrix_shape(arch::spec(role), &self.hparams);
        let codec = codec(dtype);
        let row_bytes = dtype.bytes_for(cols as u64).unwrap_or(0) as usize; // the recipe chose a type that divides
        let mut bytes = vec![0; rows * row_bytes];
        let rows_per_chunk = (CHUNK_WEIGHTS / cols.max(1)).max(1);
        bytes.par_chunks_mut(rows_per_chunk * row_bytes).enumerate().try_for_each(
            |(i, out)| -> Result<()> {
                let mut floats = vec![0.0; out.len() / row_bytes * cols];
                self.read_f32(tensor, i * rows_per_chunk * cols, &mut floats)?;
                codec.quantize(&floats, None, out);
                Ok(())
            },
        )?;
        Matrix::new(dtype, rows, cols, Bytes::Owned(bytes))
    }
}

impl WeightSource for CheckpointSource<'_> {
    fn matrix(&self, role: Role, layer: usize) -> Result<Matrix> {
        let spec = arch::spec(role);
        let (rows, cols) = matrix_shape(spec, &self.hparams);
        if let Some(recipe) = &self.recipe {
            let dtype = recipe.tensor_type(spec, &spec.gguf_name(layer), cols, self.checkpoint.tied());
            return self.quantized(role, layer, dtype);
        }
        let tensor = self.find(role, layer)?;
        let (map, range) = self.checkpoint.map(tensor)?;
        Matrix::new(tensor.dtype, rows, cols, Bytes::Mapped(map, range))
    }

    fn floats(&self, role: Role, layer: usize) -> Result<Floats> {
        let tensor = self.find(role, layer)?;
        let spec = arch::spec(role);
        let mut floats = vec![0.0; (spec.shape)(&self.hparams).iter().product()];
        self.read_f32(tensor, 0, &mut floats)?;
        // The matrices are not scaled here, so the norms use mixer_rms_eps itself.
        if spec.transform == Transform::NegExp {
            transform::apply(Transform::NegExp, &self.hparams, &mut floats)
                .map_err(|e| e.file(self.checkpoint.dir()).what(format!("tensor \"{}\"", tensor.name)))?;
        }
        Ok(Floats::Owned(floats))
    }
}
