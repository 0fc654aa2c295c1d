//! Opening a model: a GGUF file is mapped and executed as it lies; a checkpoint folder is executed as it lies too,
//! or quantized in memory.

use crate::at_once;
use crate::matrix::{self, Bytes, Floats, Matrix};
use crate::model::{Model, WeightSource};
use kestrel_formats::arch::{self, HyperParams, Role, Storage, TensorSpec, Transform};
use kestrel_formats::checkpoint::{Checkpoint, QuantState, SourceTensor};
use kestrel_formats::gguf::{self, Gguf};
use kestrel_formats::tokenizer::TokenizerData;
use kestrel_formats::{Error, ErrorKind, GgmlType, Result, WeightType};
use kestrel_quant::codec::scales::{NESTED_BLOCKSIZE, dynamic_map, quantize_scales};
use kestrel_quant::codec::{bnb4, bnb8, codec, dequantize};
use kestrel_quant::recipe::{Bnb, FileType, Recipe};
use kestrel_quant::transform;
use rayon::prelude::*;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How to open a model.
#[derive(Default)]
pub struct LoadOptions<'a> {
    /// Quantize a checkpoint folder's matrices in memory.
    pub quantize: Option<Quantize>,
    /// Called with (bytes read, bytes in all) while quantizing.
    pub progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
}

/// How to quantize at load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantize {
    /// To what this file type gives each matrix.
    Ggml(FileType),
    /// To what bitsandbytes makes of the matrices that it quantizes; the others stay as they are.
    Bnb(Bnb),
}

impl Model {
    /// Opens a GGUF file or a Hugging Face folder. Errors: whatever the readers find; `Usage` if a GGUF is to be
    /// quantized at load.
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        if path.is_dir() {
            let checkpoint = match options.quantize {
                None => Checkpoint::open_mapped(path)?,
                Some(_) => Checkpoint::open(path)?,
            };
            return Self::from_checkpoint(&checkpoint, options);
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
        file.preload();
        let source = GgufSource { file };
        // Beside each other, since the vocabulary takes longest of all that opening does.
        let (tokenizer, model) = at_once(
            || TokenizerData::from_gguf(file),
            || Self::build(file.path(), facts.hparams, facts.tied, &source),
        );
        let tokenizer = tokenizer?;
        let mut warnings = [file.warnings(), &facts.warnings].concat();
        warnings.extend(tokenizer.iter().flat_map(|t| &t.warnings).cloned());
        warnings.extend(file_type_warning(file));
        Ok(model?.with(tokenizer, warnings))
    }

    /// A model that executes the shards' own bytes, or a quantized copy in memory.
    pub fn from_checkpoint(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self> {
        let hparams = *checkpoint.hyperparams();
        let source = CheckpointSource {
            checkpoint,
            hparams,
            quantize: options.quantize,
            progress: options.progress,
            n_read: AtomicU64::new(0),
            n_total: checkpoint.tensors().iter().map(SourceTensor::n_bytes).sum(),
        };
        let model = Self::build(checkpoint.dir(), hparams, checkpoint.tied(), &source)?;
        Ok(model.with(checkpoint.tokenizer().cloned(), checkpoint.warnings().to_vec()))
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
    quantize: Option<Quantize>,
    progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    n_read: AtomicU64,
    n_total: u64,
}

/// Rows read and quantized at a time hold about this many weights.
const CHUNK_WEIGHTS: usize = 1 << 18;

impl CheckpointSource<'_> {
    fn find(&self, role: Role, layer: usize) -> Result<&SourceTensor> {
        let name = arch::spec(role).hf_name(layer);
        self.checkpoint.tensor(&name).ok_or_else(|| {
            Error::new(ErrorKind::Missing).file(self.checkpoint.dir()).what(format!("tensor \"{name}\""))
        })
    }

    /// Reads weights `first..first + out.len()` of a tensor of plain numbers as f32.
    fn read_f32(&self, t: &SourceTensor, first: usize, out: &mut [f32]) -> Result<()> {
        let size = t.dtype.block_bytes();
        let mut bytes = vec![0; out.len() * size];
        self.checkpoint.read(&t.place, (first * size) as u64, &mut bytes)?;
        dequantize(t.dtype, &bytes, first, None, out);
        self.count(bytes.len());
        Ok(())
    }

    fn count(&self, n_bytes: usize) {
        if let Some(progress) = self.progress {
            let n_bytes = n_bytes as u64;
            progress(self.n_read.fetch_add(n_bytes, Ordering::Relaxed) + n_bytes, self.n_total);
        }
    }

    /// The matrix where it lies.
    fn in_place(&self, role: Role, layer: usize) -> Result<Matrix> {
        let (rows, cols) = matrix_shape(arch::spec(role), &self.hparams);
        let tensor = self.find(role, layer)?;
        let (map, range) = self.checkpoint.map(&tensor.place)?;
        let scales = tensor.state.as_ref().map(|state| self.scales(state)).transpose()?;
        Matrix::with_scales(tensor.dtype, rows, cols, Bytes::Mapped(map, range), scales)
    }

    /// The scales of a matrix where they lie.
    fn scales(&self, state: &QuantState) -> Result<matrix::Scales> {
        let floats = |place| self.checkpoint.map(place).map(|(map, range)| Floats::mapped(&map, range));
        let (absmax, nested) = match &state.nested {
            None => (floats(&state.absmax)?, None),
            Some(nested) => {
                let (map, range) = self.checkpoint.map(&state.absmax)?;
                let codes = Bytes::Mapped(map, range);
                let (blocksize, map) = (nested.blocksize as usize, nested.map.clone());
                let nested_scales = matrix::Nested { codes, blocksize, map, offset: nested.offset };
                (floats(&nested.absmax)?, Some(nested_scales))
            }
        };
        Ok(matrix::Scales {
            blocksize: state.blocksize as usize,
            round_to: state.dtype,
            absmax,
            nested,
            largest: state.largest,
        })
    }

    /// Calls `quantize` with the weights of a matrix as f32, in pieces of `chunk` consecutive weights (the last may be
    /// shorter), in parallel, and with the parts of the outputs that belong to them.
    fn for_each_chunk<A: Send, B: Send>(
        &self,
        role: Role,
        layer: usize,
        chunk: usize,
        a: (&mut [A], usize),
        b: (&mut [B], usize),
        quantize: impl Fn(&[f32], &mut [A], &mut [B]) -> Result<()> + Sync,
    ) -> Result<()> {
        let tensor = self.find(role, layer)?;
        let packed = tensor.state.as_ref().map(|_| self.in_place(role, layer)).transpose()?;
        let (rows, cols) = matrix_shape(arch::spec(role), &self.hparams);
        let pieces = a.0.par_chunks_mut(a.1).zip(b.0.par_chunks_mut(b.1)).enumerate();
        pieces.try_for_each(|(i, (a, b))| {
            let first = i * chunk;
            let mut floats = vec![0.0; chunk.min(rows * cols - first)];
            match &packed {
                None => self.read_f32(tensor, first, &mut floats)?,
                Some(matrix) => {
                    matrix.view().expand_flat(first, &mut floats);
                    self.count(tensor.n_bytes() as usize * floats.len() / (rows * cols));
                }
            }
            quantize(&floats, a, b).map_err(|e| self.about(tensor, e))
        })
    }

    fn about(&self, tensor: &SourceTensor, e: Error) -> Error {
        e.file(self.checkpoint.dir()).what(format!("tensor \"{}\"", tensor.name))
    }

    /// The matrix quantized to `dtype`, a bounded number of rows in f32 at a time.
    fn quantized(&self, role: Role, layer: usize, dtype: GgmlType) -> Result<Matrix> {
        let (rows, cols) = matrix_shape(arch::spec(role), &self.hparams);
        let codec = codec(dtype);
        let row_bytes = dtype.bytes_for(cols as u64).unwrap_or(0) as usize; // the recipe chose a type that divides
        let mut bytes = vec![0; rows * row_bytes];
        let chunk_rows = (CHUNK_WEIGHTS / cols.max(1)).max(1);
        let mut none = vec![(); rows];
        let (a, b) = ((&mut bytes[..], chunk_rows * row_bytes), (&mut none[..], chunk_rows));
        self.for_each_chunk(role, layer, chunk_rows * cols, a, b, |floats, out, _| {
            codec.quantize(floats, None, out);
            Ok(())
        })?;
        Matrix::new(dtype, rows, cols, Bytes::Owned(bytes))
    }

    /// The matrix quantized as bitsandbytes does it.
    fn quantized_bnb(&self, role: Role, layer: usize, bnb: Bnb) -> Result<Matrix> {
        let (rows, cols) = matrix_shape(arch::spec(role), &self.hparams);
        let Some(n_bytes) = bnb.dtype.bytes_for(cols as u64).map(|row| rows * row as usize) else {
            return Err(self.about(self.find(role, layer)?, bnb4::odd_row(cols)));
        };
        let mut bytes = vec![0; n_bytes];
        if bnb.dtype == WeightType::Int8 {
            let mut absmax = vec![0.0; rows];
            let chunk_rows = (CHUNK_WEIGHTS / cols.max(1)).max(1);
            let (a, b) = ((&mut bytes[..], chunk_rows * cols), (&mut absmax[..], chunk_rows));
            self.for_each_chunk(role, layer, chunk_rows * cols, a, b, |floats, codes, scales| {
                let rows = floats.chunks(cols).zip(codes.chunks_mut(cols)).zip(scales);
                rows.into_iter().try_for_each(|((row, codes), scale)| {
                    *scale = bnb8::quantize_row(row, codes)?;
                    Ok(())
                })
            })?;
            let scales = matrix::Scales {
                blocksize: cols,
                round_to: GgmlType::F32,
                largest: largest(&absmax),
                absmax: Floats::Owned(absmax),
                nested: None,
            };
            return Matrix::with_scales(bnb.dtype, rows, cols, Bytes::Owned(bytes), Some(scales));
        }
        let mut absmax = vec![0.0; (rows * cols).div_ceil(bnb.blocksize)];
        let (a, b) = ((&mut bytes[..], CHUNK_WEIGHTS / 2), (&mut absmax[..], CHUNK_WEIGHTS / bnb.blocksize));
        self.for_each_chunk(role, layer, CHUNK_WEIGHTS, a, b, |floats, codes, absmax| {
            bnb4::quantize(bnb.dtype, bnb.blocksize, floats, codes, absmax)
        })?;
        let round_to = match self.find(role, layer)? {
            SourceTensor { dtype: WeightType::Ggml(ty), .. } => *ty,
            SourceTensor { state, .. } => state.as_ref().map_or(GgmlType::F32, |s| s.dtype),
        };
        let largest = largest(&absmax);
        let scales = match bnb.double_quant {
            false => (absmax, None),
            true => {
                let scales = quantize_scales(&absmax);
                let (codes, blocksize) = (Bytes::Owned(scales.codes), NESTED_BLOCKSIZE);
                let nested =
                    matrix::Nested { codes, blocksize, map: Arc::new(dynamic_map()), offset: scales.offset };
                (scales.absmax, Some(nested))
            }
        };
        let (absmax, nested) = scales;
        let scales = matrix::Scales {
            blocksize: bnb.blocksize,
            round_to,
            absmax: Floats::Owned(absmax),
            nested,
            largest,
        };
        Matrix::with_scales(bnb.dtype, rows, cols, Bytes::Owned(bytes), Some(scales))
    }
}

fn largest(scales: &[f32]) -> f32 {
    scales.iter().fold(0f32, |max, x| max.max(*x))
}

impl WeightSource for CheckpointSource<'_> {
    fn matrix(&self, role: Role, layer: usize) -> Result<Matrix> {
        match self.quantize {
            Some(Quantize::Ggml(file_type)) => {
                let spec = arch::spec(role);
                let (_, cols) = matrix_shape(spec, &self.hparams);
                let recipe = Recipe::new(file_type, &[])?;
                let dtype = recipe.tensor_type(spec, &spec.gguf_name(layer), cols, self.checkpoint.tied());
                self.quantized(role, layer, dtype)
            }
            Some(Quantize::Bnb(bnb)) if bnb.quantizes(role) => self.quantized_bnb(role, layer, bnb),
            _ => self.in_place(role, layer),
        }
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
