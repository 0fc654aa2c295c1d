//! What a conversion reads: a checkpoint folder or a GGUF file, as one list of tensors and their places in files.

use crate::stream::read_at;
use kestrel_formats::arch::{self, HyperParams, Role, TensorSpec, Transform};
use kestrel_formats::checkpoint::{self, Checkpoint, QuantState};
use kestrel_formats::gguf::{self, Gguf};
use kestrel_formats::map::{Stamp, open_regular};
use kestrel_formats::{Error, ErrorKind, GgmlType, Result, WeightType};
use kestrel_quant::codec::scales::{Absmax, Scales};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// `kestrel.*` key of the factor that `ssm_x.weight` was multiplied with, as
/// [`HyperParams::x_proj_scale`] explains.
pub const SSM_X_SCALE: &str = "kestrel.ssm_x_scale";

/// Bytes compared at a time.
const COMPARE_BYTES: usize = 1 << 20;

/// Where the weights come from. A process has one or two, so their size does not matter.
#[allow(clippy::large_enum_variant)]
pub enum Source {
    /// A folder as Hugging Face publishes it.
    Checkpoint(Checkpoint),
    /// A GGUF file of any type, ours or llama.cpp's, possibly split.
    Gguf(Gguf),
}

impl Source {
    /// Opens a folder as a checkpoint and a file as GGUF.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            Checkpoint::open(path).map(Self::Checkpoint)
        } else {
            Gguf::open(path).map(Self::Gguf)
        }
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Checkpoint(c) => c.dir(),
            Self::Gguf(g) => g.path(),
        }
    }

    /// What is odd about it and yet no reason to refuse it.
    pub fn warnings(&self) -> &[String] {
        match self {
            Self::Checkpoint(c) => c.warnings(),
            Self::Gguf(g) => g.warnings(),
        }
    }

    /// The factor that the source's `ssm_x.weight` already carries.
    pub(crate) fn ssm_x_scale(&self) -> Result<f32> {
        match self {
            Self::Checkpoint(_) => Ok(1.0),
            Self::Gguf(g) => Ok(g.metadata().f32(SSM_X_SCALE)?.unwrap_or(1.0)),
        }
    }
}

/// A file of the source, and what tells whether it changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InputFile {
    pub path: PathBuf,
    stamp: Stamp,
}

impl InputFile {
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "opening the file", e))?;
        Ok(Self { path: path.to_owned(), stamp: Stamp::of(&meta) })
    }

    pub(crate) fn n_bytes(&self) -> u64 {
        self.stamp.n_bytes
    }

    /// What tells later runs whether the file is the same: size and time of modification. Numbers of devices and inodes
    /// may change when the machine is started anew.
    pub(crate) fn lasting(&self) -> [u64; 3] {
        let (seconds, nanoseconds) = self.stamp.modified;
        [self.stamp.n_bytes, seconds as u64, nanoseconds as u64]
    }

    /// The file's own name, for provenance.
    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// `Changed` if the path no longer leads to the same bytes, as far as size, time and inode tell.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        match Self::new(&self.path) {
            Ok(now) if now == *self => Ok(()),
            Ok(now) => Err(Error::new(ErrorKind::Changed)
                .file(&self.path)
                .expected(format!("the file that was opened, of {} bytes", self.n_bytes()))
                .found(format!("a file of {} bytes that was replaced or modified meanwhile", now.n_bytes()))),
            Err(e) => Err(e),
        }
    }
}

/// Where the bytes of a tensor lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Index of the file.
    pub file: usize,
    /// Byte offset in it.
    pub offset: u64,
    pub n_bytes: u64,
}

/// A tensor of the source.
#[derive(Clone, Debug)]
pub(crate) struct InputTensor {
    pub spec: &'static TensorSpec,
    /// Name in GGUF.
    pub name: String,
    /// Name in the source.
    pub source_name: String,
    pub dtype: WeightType,
    /// Shape in GGUF, (rows, cols) or (n).
    pub shape: Vec<u64>,
    /// The weights, or the codes of a matrix of bitsandbytes.
    pub place: Place,
    /// What such a matrix has beside its codes; the shards are `Input::files`.
    pub state: Option<QuantState>,
    /// What is left to do to the numbers.
    pub transform: Transform,
}

impl InputTensor {
    pub(crate) fn cols(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes of one row in the source.
    pub(crate) fn row_bytes(&self) -> u64 {
        row_bytes(self.dtype, self.cols())
    }
}

/// Bytes of a row; the readers and the recipe make sure that blocks divide it.
pub(crate) fn row_bytes(dtype: impl Into<WeightType>, cols: u64) -> u64 {
    dtype.into().bytes_for(cols).unwrap_or(0)
}

/// Everything that is read, in the order of the output.
pub(crate) struct Input {
    pub h: HyperParams,
    pub tied: bool,
    pub files: Vec<InputFile>,
    pub tensors: Vec<InputTensor>,
    /// The files again, for scales that lie elsewhere than the codes; empty if there are none.
    beside: Vec<File>,
}

impl Input {
    /// Lists the tensors. An output matrix that equals the embedding byte for byte is left out.
    pub(crate) fn of(source: &Source) -> Result<Self> {
        match source {
            Source::Checkpoint(c) => Self::of_checkpoint(c),
            Source::Gguf(g) => Self::of_gguf(g),
        }
    }

    fn of_checkpoint(c: &Checkpoint) -> Result<Self> {
        let h = *c.hyperparams();
        let files = c.shards().iter().map(|s| InputFile::new(&s.path)).collect::<Result<Vec<_>>>()?;
        let find = |spec: &'static TensorSpec, layer: usize| {
            let source_name = spec.hf_name(layer);
            let t = c.tensor(&source_name).ok_or_else(|| missing(c.dir(), &source_name))?;
            Ok(InputTensor {
                spec,
                name: spec.gguf_name(layer),
                source_name,
                dtype: t.dtype,
                shape: (spec.shape)(&h).iter().map(|&n| n as u64).collect(),
                place: Place { file: t.place.shard, offset: t.place.offset, n_bytes: t.place.n_bytes },
                state: t.state.as_deref().cloned(),
                transform: match spec.transform {
                    Transform::RmsEpsScale if h.x_proj_scale() == 1.0 => Transform::None,
                    other => other,
                },
            })
        };
        let mut tied = c.tied();
        if !tied {
            let embedding = find(arch::spec(Role::TokenEmbd), 0)?;
            let output = find(arch::spec(Role::Output), 0)?;
            tied = equal_bytes(&files, &embedding, &output)?;
        }
        let tensors = arch::tensors(&h, tied).into_iter().map(|(s, l)| find(s, l)).collect::<Result<_>>()?;
        let beside = match c.tensors().iter().any(|t| t.state.is_some()) {
            true => files.iter().map(|f| open_regular(&f.path)).collect::<Result<_>>()?,
            false => Vec::new(),
        };
        c.check_unchanged()?; // since its headers were read
        Ok(Self { h, tied, files, tensors, beside })
    }

    /// The parts of a GGUF file.
    pub(crate) fn files_of_gguf(g: &Gguf) -> Result<Vec<InputFile>> {
        let n_parts = g.tensors().iter().map(|t| t.part + 1).max().unwrap_or(1);
        let path_of =
            |part| g.tensors().iter().find(|t| t.part == part).map_or(g.path(), |t| g.map_of(t).0.path());
        (0..n_parts).map(|part| InputFile::new(path_of(part))).collect()
    }

    fn of_gguf(g: &Gguf) -> Result<Self> {
        let (h, tied) = gguf::hyperparams_from_gguf(g)?;
        let files = Self::files_of_gguf(g)?;
        let find = |(spec, layer): (&'static TensorSpec, usize)| {
            let name = spec.gguf_name(layer);
            let t = g.tensor(&name).ok_or_else(|| missing(g.path(), &name))?.info;
            Ok(InputTensor {
                spec,
                source_name: name.clone(),
                name,
                dtype: t.dtype.into(),
                shape: t.shape.clone(),
                place: Place { file: t.part, offset: t.offset, n_bytes: t.n_bytes },
                state: None,
                transform: Transform::None, // done when the file was made
            })
        };
        let tensors = arch::tensors(&h, tied).into_iter().map(find).collect::<Result<_>>()?;
        Ok(Self { h, tied, files, tensors, beside: Vec::new() })
    }

    /// Reads the scales of weights `first..first + n` of a tensor, if it has them beside its codes.
    pub(crate) fn scales(&self, t: &InputTensor, first: u64, n: u64) -> Result<Option<PieceScales>> {
        let Some(state) = &t.state else { return Ok(None) };
        let blocks = first / state.blocksize..(first + n).div_ceil(state.blocksize);
        let absmax = match &state.nested {
            None => self.read_f32(&state.absmax, blocks.clone())?,
            Some(nested) => {
                let mut codes = vec![0; (blocks.end - blocks.start) as usize];
                self.read_beside(&state.absmax, blocks.start, &mut codes)?;
                let outer = blocks.start / nested.blocksize..blocks.end.div_ceil(nested.blocksize);
                let absmax = self.read_f32(&nested.absmax, outer.clone())?;
                // Codes are counted from the first whose outer block was read.
                let skipped = (blocks.start - outer.start * nested.blocksize) as usize;
                codes.splice(..0, std::iter::repeat_n(0, skipped));
                let scales = Absmax::Nested {
                    codes: &codes,
                    absmax: &absmax,
                    blocksize: nested.blocksize as usize,
                    map: &nested.map,
                    offset: nested.offset,
                };
                (skipped..codes.len()).map(|block| scales.get(block)).collect()
            }
        };
        let first = (first - blocks.start * state.blocksize) as usize;
        Ok(Some(PieceScales { absmax, first, blocksize: state.blocksize as usize, round_to: state.dtype }))
    }

    fn read_f32(&self, place: &checkpoint::Place, range: Range<u64>) -> Result<Vec<f32>> {
        let mut bytes = vec![0; 4 * (range.end - range.start) as usize];
        self.read_beside(place, 4 * range.start, &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn read_beside(&self, place: &checkpoint::Place, offset: u64, buf: &mut [u8]) -> Result<()> {
        read_at(&self.beside[place.shard], &self.files[place.shard], place.offset + offset, buf)
    }
}

/// Scales of some rows of a matrix.
pub(crate) struct PieceScales {
    absmax: Vec<f32>,
    /// Where in the first block the rows begin.
    pub first: usize,
    blocksize: usize,
    round_to: GgmlType,
}

impl PieceScales {
    /// The form that codecs take; weights are counted from the begin of the first block.
    pub(crate) fn view(&self) -> Scales<'_> {
        Scales { blocksize: self.blocksize, round_to: self.round_to, absmax: Absmax::F32(&self.absmax) }
    }
}

fn missing(file: &Path, name: &str) -> Error {
    Error::new(ErrorKind::Missing).file(file).what(format!("tensor \"{name}\""))
}

/// Whether two tensors hold the same bytes; stops at the first difference.
fn equal_bytes(files: &[InputFile], a: &InputTensor, b: &InputTensor) -> Result<bool> {
    if (a.dtype, &a.shape) != (b.dtype, &b.shape) {
        return Ok(false);
    }
    let (file_a, file_b) = (&files[a.place.file], &files[b.place.file]);
    let (open_a, open_b) = (open_regular(&file_a.path)?, open_regular(&file_b.path)?);
    let (mut bytes_a, mut bytes_b) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
    let mut done = 0;
    while done < a.place.n_bytes {
        let n = (a.place.n_bytes - done).min(COMPARE_BYTES as u64) as usize;
        read_at(&open_a, file_a, a.place.offset + done, &mut bytes_a[..n])?;
        read_at(&open_b, file_b, b.place.offset + done, &mut bytes_b[..n])?;
        if bytes_a[..n] != bytes_b[..n] {
            return Ok(false);
        }
        done += n as u64;
    }
    Ok(true)
}
