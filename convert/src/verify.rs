//! How far the tensors of a finished GGUF file are from their source.

use crate::input::{Input, InputFile, InputTensor, SSM_X_SCALE, Source, row_bytes};
use crate::metadata::CALIBRATION_FILE;
use crate::progress::{Phase, Progress};
use crate::rows::{Expanded, Rows, pieces};
use crate::stream::{Piece, Streaming, read_at, stream};
use kestrel_formats::arch::{Role, Transform};
use kestrel_formats::gguf::{Gguf, TensorInfo};
use kestrel_formats::map::open_regular;
use kestrel_formats::{Error, ErrorKind, GgmlType, Result, WeightType};
use kestrel_quant::error_measure::{ErrorStats, relative_rmse_limit};
use kestrel_quant::transform;
use std::fs::File;
use std::sync::atomic::AtomicBool;

/// The tensor to compare with, or why there is none.
type Match = std::result::Result<TensorInfo, String>;

/// Tensors named in an error; the rest are counted.
const NAMED_MAX: usize = 3;

/// How one tensor compares with its source.
#[derive(Clone, Debug)]
pub struct TensorReport {
    /// Name in GGUF.
    pub name: String,
    /// Type in the source.
    pub source_dtype: WeightType,
    /// Type in the file; `None` if the tensor is absent.
    pub dtype: Option<GgmlType>,
    /// The error of every weight, over the whole tensor.
    pub stats: ErrorStats,
    /// The largest relative RMSE that the type may have.
    pub limit: f64,
    /// Why it fails; `None` if it does not.
    pub problem: Option<String>,
}

/// How a file compares with its source.
#[derive(Clone, Debug)]
pub struct VerifyReport {
    /// One entry per tensor that the source asks for, in file order.
    pub tensors: Vec<TensorReport>,
    /// What is odd and yet no failure.
    pub warnings: Vec<String>,
    /// What is wrong with the file as a whole.
    pub problems: Vec<String>,
}

impl VerifyReport {
    /// Whether everything is within its limits.
    pub fn passed(&self) -> bool {
        self.problems.is_empty() && self.tensors.iter().all(|t| t.problem.is_none())
    }

    /// `VerifyFailed` with the first problems, unless it passed.
    pub fn verdict(&self) -> Result<()> {
        if self.passed() {
            return Ok(());
        }
        let tensors =
            self.tensors.iter().filter_map(|t| Some(format!("{}: {}", t.name, t.problem.as_ref()?)));
        let all: Vec<String> = self.problems.iter().cloned().chain(tensors).collect();
        let more = match all.len().saturating_sub(NAMED_MAX) {
            0 => String::new(),
            n => format!("; and {n} more"),
        };
        Err(Error::new(ErrorKind::VerifyFailed)
            .what(format!("{} of {} tensors", all.len() - self.problems.len(), self.tensors.len()))
            .expected("every tensor within the error of its type")
            .found(format!("{}{more}", all[..all.len().min(NAMED_MAX)].join("; "))))
    }
}

/// Compares every tensor of `file` with `source`, streaming both.
///
/// A file without `kestrel.ssm_x_scale`, such as llama.cpp's, is compared unscaled and gets a warning. What fails the
/// comparison is in the report; an `Err` means that there was nothing to compare, or that it could not be read.
pub fn verify(
    file: &Gguf,
    source: &Source,
    threads: usize,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<VerifyReport> {
    let mut input = Input::of(source)?;
    let target = Target::of(file)?;
    let mut report = VerifyReport { tensors: Vec::new(), warnings: Vec::new(), problems: Vec::new() };
    let scale = ssm_x_factor(&mut input, file, source, &mut report)?;
    let matched: Vec<_> = input.tensors.iter().map(|t| Target::find(file, t)).collect();
    check_names(file, &input, &mut report);

    // What cannot be compared is not read.
    let mut pieces = pieces(&input.tensors);
    pieces.retain(|p| matched[p.tensor].is_ok());
    progress.phase(Phase::Verify, pieces.iter().map(|p| p.n_bytes as u64).sum(), 0);
    let job = Streaming { files: &input.files, pieces: &pieces, threads, sha256: false, cancel };
    let streamed = stream(job, Scratch::default, |scratch, piece, bytes| {
        let tensor = &input.tensors[piece.tensor];
        if piece.first_row == 0 {
            progress.tensor(&tensor.name);
        }
        let Ok(info) = &matched[piece.tensor] else { return Ok((piece.tensor, ErrorStats::default())) };
        let factor = if tensor.spec.role == Role::SsmX { scale } else { 1.0 };
        let rows = Rows { input: &input, tensor, piece, bytes };
        let stats = compare(&rows, &target, info, factor, scratch)?;
        progress.bytes(piece.n_bytes as u64, 0);
        Ok((piece.tensor, stats))
    })?;

    // Pieces come in a fixed order, so that the sums do not depend on the number of threads.
    let mut stats = vec![ErrorStats::default(); input.tensors.len()];
    streamed.results.iter().for_each(|(tensor, s)| stats[*tensor].merge(s));
    // Error feedback brings the outputs closer and takes the weights further away.
    let fed = file.metadata().contains(CALIBRATION_FILE);
    let factor = if fed { 2.0 } else { 1.0 };
    let judged =
        input.tensors.iter().zip(&matched).zip(stats).map(|((t, m), stats)| judge(t, m, stats, factor));
    report.tensors.extend(judged);
    input.files.iter().chain(&target.files).try_for_each(InputFile::check_unchanged)?;
    Ok(report)
}

/// The file that is judged, opened for positioned reads.
struct Target {
    files: Vec<InputFile>,
    open: Vec<File>,
}

impl Target {
    fn of(file: &Gguf) -> Result<Self> {
        let files = Input::files_of_gguf(file)?;
        let open = files.iter().map(|f| open_regular(&f.path)).collect::<Result<_>>()?;
        Ok(Self { files, open })
    }

    fn find(file: &Gguf, tensor: &InputTensor) -> Match {
        let info = file.tensor(&tensor.name).ok_or("absent")?.info;
        if info.shape != tensor.shape {
            return Err(format!("shape {:?} instead of {:?}", info.shape, tensor.shape));
        }
        Ok(info.clone())
    }
}

#[derive(Default)]
struct Scratch {
    source: Vec<f32>,
    bytes: Vec<u8>,
    got: Vec<f32>,
}

/// The error of one piece.
fn compare(
    rows: &Rows,
    target: &Target,
    info: &TensorInfo,
    factor: f32,
    scratch: &mut Scratch,
) -> Result<ErrorStats> {
    let Piece { first_row, rows: n_rows, .. } = *rows.piece;
    let row = row_bytes(info.dtype, rows.tensor.cols());
    let Scratch { source, bytes, got } = scratch;
    bytes.resize((n_rows * row) as usize, 0);
    read_at(&target.open[info.part], &target.files[info.part], info.offset + first_row * row, bytes)?;
    let mut stats = ErrorStats::default();
    let mut scaled = Vec::new();
    rows.for_each(source, |Expanded { first, floats, .. }| {
        let floats = if factor == 1.0 {
            floats
        } else {
            scaled.clear();
            scaled.extend(floats.iter().map(|x| x * factor));
            scaled.as_slice()
        };
        let at = first / info.dtype.block_len() * info.dtype.block_bytes();
        let n = floats.len() / info.dtype.block_len() * info.dtype.block_bytes();
        got.resize(floats.len(), 0.0);
        transform::to_f32(info.dtype, &bytes[at..at + n], got);
        stats.accumulate(floats, got);
        Ok(())
    })?;
    Ok(stats)
}

/// `factor` times the limit of the type is allowed.
fn judge(tensor: &InputTensor, matched: &Match, stats: ErrorStats, factor: f64) -> TensorReport {
    let (dtype, limit, problem) = match matched {
        Err(why) => (None, 0.0, Some(why.clone())),
        Ok(info) => {
            let limit = factor * relative_rmse_limit(info.dtype);
            let problem = if stats.n_nan + stats.n_inf > 0 {
                Some(format!("{} NaN and {} infinite numbers", stats.n_nan, stats.n_inf))
            } else if stats.relative_rmse() > limit {
                Some(format!(
                    "relative error {:.6}, where {} may have {limit}",
                    stats.relative_rmse(),
                    info.dtype
                ))
            } else {
                None
            };
            (Some(info.dtype), limit, problem)
        }
    };
    TensorReport { name: tensor.name.clone(), source_dtype: tensor.dtype, dtype, stats, limit, problem }
}

/// The factor between the `ssm_x.weight` of the source as [`Input`] transforms it and that of the file. A checkpoint's
/// transform is dropped if the file was made without it.
fn ssm_x_factor(input: &mut Input, file: &Gguf, source: &Source, report: &mut VerifyReport) -> Result<f32> {
    let expected = match source {
        Source::Checkpoint(_) => input.h.x_proj_scale(),
        Source::Gguf(_) => source.ssm_x_scale()?,
    };
    let stated = file.metadata().f32(SSM_X_SCALE)?;
    if stated.unwrap_or(1.0) == expected {
        return Ok(1.0);
    }
    let Some(stated) = stated else {
        input
            .tensors
            .iter_mut()
            .filter(|t| t.spec.role == Role::SsmX)
            .for_each(|t| t.transform = Transform::None);
        report.warnings.push(format!(
            "made without the eps scale on ssm_x ({expected}): dt, B and C are normed with layer_norm_epsilon, which \
             is not what the checkpoint asks for"
        ));
        return Ok(match source {
            Source::Checkpoint(_) => 1.0,
            Source::Gguf(_) => 1.0 / expected,
        });
    };
    report.problems.push(format!("{SSM_X_SCALE} is {stated} instead of {expected}"));
    Ok(1.0)
}

/// Tensors that the source does not ask for make llama.cpp refuse the file.
fn check_names(file: &Gguf, input: &Input, report: &mut VerifyReport) {
    let known: std::collections::HashSet<&str> = input.tensors.iter().map(|t| t.name.as_str()).collect();
    for t in file.tensors().iter().filter(|t| !known.contains(t.name.as_str())) {
        report.problems.push(format!("tensor \"{}\" has no counterpart in the source", t.name));
    }
}
