//! `kestrel calibrate`: what the inputs of every matrix are like, and what each type does to the predictions.

use crate::failure::Outcome;
use crate::model::ModelArgs;
use crate::progress::Count;
use crate::windows::Windows;
use crate::{files, interrupt, output};
use clap::Args;
use kestrel_formats::arch::{Role, spec};
use kestrel_formats::calibration::{CalibratedMatrix, CalibrationSource, CalibrationWriter, group_len};
use kestrel_formats::{Error, ErrorKind, GgmlType, Result};
use kestrel_quant::feedback::{Feedback, GROUP_USUAL};
use kestrel_runtime::Model;
use kestrel_runtime::evaluate::{Divergence, log_softmax, scored};
use kestrel_runtime::observe::ColumnProducts;
use kestrel_runtime::probe::Quantizer;
use kestrel_runtime::state::checksum;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// The types whose divergence is measured.
const TYPES: [GgmlType; 7] = [
    GgmlType::Q2K,
    GgmlType::Q3K,
    GgmlType::Iq4Xs,
    GgmlType::Q4K,
    GgmlType::Q5K,
    GgmlType::Q6K,
    GgmlType::Q8_0,
];
/// The type that a model is really run with for each matrix; the others follow by their errors. Coarse enough to stand
/// out of what f32 rounds, fine enough that the divergence still grows with the squared error.
const PROBE: GgmlType = GgmlType::Q3K;
/// Bytes of products that are summed in memory during one pass over the text.
const PASS_BYTES: usize = 640 << 20;

/// Measure what --calibration of convert and quantize needs, on a text
///
/// For error feedback, the products of the inputs of every matrix, of columns in groups; the layers are taken in as
/// many passes over the text as fit in 640 MiB. For --target-size and its kin, the KL divergence of the model with each
/// matrix in turn quantized; meanwhile OUT.part also holds what the model predicts, 66 MB per window of the 7B. An
/// interrupted run leaves OUT.part, from which --resume goes on, in either half.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel calibrate falcon-mamba-7b -f calibration.txt -o falcon.calibration.gguf --chunks 32
  kestrel convert falcon-mamba-7b -o falcon.gguf --calibration falcon.calibration.gguf --target-size 4.0GB")]
pub struct CalibrateArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// The text, UTF-8; - is stdin
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,

    /// File to write
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,

    /// Tokens of a window
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=1 << 20))]
    ctx: u32,

    /// Read only the first N windows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,

    /// Measure the divergence on N of the windows; 0 leaves it out
    #[arg(long, value_name = "N", default_value_t = 8)]
    kl_chunks: u32,

    /// Columns of a group at most; feedback does not go from one to another
    #[arg(long, value_name = "N", default_value_t = GROUP_USUAL as u32, value_parser = clap::value_parser!(u32).range(256..=1 << 15))]
    group: u32,

    /// Go on from OUT.part, if it is there
    #[arg(long)]
    resume: bool,

    /// Replace OUT if it exists
    #[arg(long)]
    force: bool,
}

pub fn run(args: &CalibrateArgs) -> Outcome {
    let text = files::read_text(&args.file)?;
    let mut model = args.model.open()?;
    if let Some((_, m)) = model.matrices().find(|(_, m)| m.dtype.is_quantized()) {
        let note = format!("calibrating a model that is quantized already ({})", m.dtype);
        output::warnings(model.path(), &[note]);
    }
    let windows = Windows::of_text(&args.file, &text, &model.tokenizer()?, args.ctx, args.chunks)?;
    let matrices = matrices(&model, args.group as usize);
    let bytes: Vec<u8> = windows.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    let source = CalibrationSource {
        model: model.fingerprint(),
        tokens: checksum(&bytes),
        ctx: args.ctx,
        dataset: args.file.display().to_string(),
        types: TYPES.into(),
    };
    let list: Vec<_> = matrices.iter().map(|(_, _, m)| m.clone()).collect();
    let writer = CalibrationWriter::open(&args.output, &source, &list, (args.force, args.resume))?;
    let work = Work { args, windows: &windows, matrices: &matrices, writer: &writer };
    work.products(&model)?;
    if args.kl_chunks > 0 {
        work.divergences(&mut model)?;
    }
    model.check_unchanged()?;
    let target = writer.finish()?;
    output::note(&format!("{}: {} matrices", target.display(), matrices.len()));
    Ok(())
}

/// Every matrix that can be quantized: role, layer, and how it is calibrated. Columns that no block type divides are left
/// out.
fn matrices(model: &Model, most: usize) -> Vec<(Role, usize, CalibratedMatrix)> {
    const PER_LAYER: [Role; 4] = [Role::SsmIn, Role::SsmX, Role::SsmDt, Role::SsmOut];
    let layers = (0..model.hparams().n_layer).flat_map(|i| PER_LAYER.map(|role| (role, i)));
    let all = [(Role::TokenEmbd, 0), (Role::Output, 0)].into_iter().chain(layers);
    all.filter_map(|(role, layer)| {
        let cols = model.matrix(role, layer)?.cols;
        let has_inputs = role != Role::TokenEmbd || model.is_tied();
        let group = if has_inputs { group_len(cols, most) } else { 0 };
        let name = spec(role).gguf_name(layer);
        cols.is_multiple_of(32).then_some((role, layer, CalibratedMatrix { name, cols, group }))
    })
    .collect()
}

/// A measurement under way.
struct Work<'a> {
    args: &'a CalibrateArgs,
    windows: &'a Windows,
    matrices: &'a [(Role, usize, CalibratedMatrix)],
    writer: &'a CalibrationWriter,
}

impl Work<'_> {
    /// The products of all layers that are not there yet.
    fn products(&self, model: &Model) -> Result<()> {
        let so_far = self.writer.so_far()?;
        let missing = |layer: &usize| {
            let mut of_layer = self.matrices.iter().filter(|(_, l, m)| l == layer && m.group > 0);
            of_layer.any(|(_, _, m)| so_far.products(&m.name).is_none())
        };
        let layer_bytes = |layer: usize| -> usize {
            let of_layer = self.matrices.iter().filter(|(_, l, _)| *l == layer);
            of_layer.map(|(_, _, m)| 4 * m.cols * m.group).sum()
        };
        let mut layers = (0..model.hparams().n_layer).filter(missing).peekable();
        let mut passes: Vec<Range<usize>> = Vec::new();
        while let Some(first) = layers.next() {
            let (mut end, mut bytes) = (first + 1, layer_bytes(first));
            while let Some(next) = layers.next_if(|&l| l == end && bytes + layer_bytes(l) <= PASS_BYTES) {
                (end, bytes) = (next + 1, bytes + layer_bytes(next));
            }
            passes.push(first..end);
        }
        let bar = Count::new("windows of inputs", self.windows.len() * passes.len(), 0);
        let mut session = self.args.model.session(model)?;
        for layers in passes {
            let mut sums = ColumnProducts::new(layers.clone(), self.args.group as usize, model.is_tied());
            for window in self.windows.iter() {
                self.check_interrupt()?;
                session.reset();
                session.observe(&window, &mut sums)?;
                bar.advance(1, &format!("layers {} to {}", layers.start, layers.end - 1));
            }
            for (name, means, count) in sums.means() {
                if self.matrices.iter().any(|(_, _, m)| m.name == name) {
                    self.writer.products(&name, &means, count as f32).map_err(|e| e.file(model.path()))?;
                }
            }
        }
        Ok(())
    }

    /// The divergences that are not there yet.
    fn divergences(&self, model: &mut Model) -> Result<()> {
        let so_far = self.writer.so_far()?;
        let missing: Vec<_> =
            self.matrices.iter().filter(|(_, _, m)| so_far.divergence(&m.name).is_none()).collect();
        let bar = Count::new("matrices", self.matrices.len(), self.matrices.len() - missing.len());
        let base = self.set_base_aside(model)?;
        for (role, layer, m) in missing {
            self.check_interrupt()?;
            let feedback = so_far.products(&m.name).map(|products| {
                Feedback::new(&products).ok_or_else(|| {
                    Error::new(ErrorKind::Inconsistent)
                        .file(so_far.path())
                        .what(format!("products of \"{}\"", m.name))
                        .expected("those of some inputs")
                })
            });
            let feedback = feedback.transpose()?;
            let quantizer = Quantizer { feedback: feedback.as_ref() };
            let Some(matrix) = model.matrix(*role, *layer) else { continue };
            let fits = |ty: GgmlType| m.cols.is_multiple_of(ty.block_len());
            let probe = if fits(PROBE) { PROBE } else { GgmlType::Q4_0 };
            let probe_error = quantizer.error(matrix, probe);
            let shares: Vec<f64> = TYPES
                .iter()
                .map(|&ty| if fits(ty) { quantizer.error(matrix, ty) / probe_error } else { f64::INFINITY })
                .collect();
            let new = quantizer.requantized(matrix, probe)?;
            let old = model.replace_matrix(*role, *layer, new);
            let kl = self.divergence(model, base);
            model.replace_matrix(*role, *layer, old);
            let kl = kl?;
            // A matrix that is all zero has no error in any type.
            let of_share = |share: &f64| if share.is_nan() { 0.0 } else { (kl * share) as f32 };
            let all: Vec<f32> = shares.iter().map(of_share).collect();
            self.writer.divergence(&m.name, &all)?;
            bar.advance(1, &format!("{} as {probe}: KL {kl:.2e}", m.name));
        }
        Ok(())
    }

    /// Calls `each` with the logits of the scored positions of the windows that the divergence is measured on, counted,
    /// and the token that follows.
    fn logits(&self, model: &Model, mut each: impl FnMut(u64, u32, &[f32]) -> Result<()>) -> Result<()> {
        let options = self.args.model.runner_options(self.args.model.threads.get());
        let options = kestrel_runtime::RunnerOptions { precise: true, ..options };
        let mut session = kestrel_runtime::Session::new(model, &options)?;
        let (mut position, mut result) = (0, Ok(()));
        for window in self.windows.iter().take(self.args.kl_chunks as usize) {
            let scored = scored(window.len());
            let (unscored, read) = (&window[..scored.start], &window[scored.clone()]);
            session.reset();
            session.prefill(unscored)?;
            session.prefill_with_logits(read, |i, logits| {
                if result.is_ok() {
                    result = each(position, window[scored.start + i + 1], logits);
                }
                position += 1;
            })?;
        }
        result
    }

    /// Keeps the base model's log-probabilities of every scored position, rounded to f32. They are set aside on disk: of
    /// eight windows of the 7B they have 530 MB, half of what the command may take of memory. Returns the bytes of a
    /// position.
    fn set_base_aside(&self, model: &Model) -> Result<u64> {
        let mut log_probs = vec![0.0; model.hparams().vocab_size];
        let mut bytes = Vec::new();
        let row_bytes = 4 * log_probs.len() as u64;
        self.logits(model, |position, _, logits| {
            log_softmax(logits, &mut log_probs);
            bytes.clear();
            bytes.extend(log_probs.iter().flat_map(|&x| (x as f32).to_le_bytes()));
            self.writer.set_aside(position * row_bytes, &bytes)
        })?;
        Ok(row_bytes)
    }

    /// Mean divergence from the base model, of which a position has `row_bytes`.
    fn divergence(&self, model: &Model, row_bytes: u64) -> Result<f64> {
        let mut sum = Divergence::default();
        let vocab = model.hparams().vocab_size;
        let (mut p, mut q) = (vec![0.0; vocab], vec![0.0; vocab]);
        let (mut bytes, mut base) = (vec![0; row_bytes as usize], Vec::with_capacity(vocab));
        self.logits(model, |position, next, logits| {
            self.writer.read_aside(position * row_bytes, &mut bytes)?;
            base.clear();
            base.extend(bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)));
            log_softmax(logits, &mut q);
            // Normalized again, or the rounding of the base would show.
            log_softmax(&base, &mut p);
            sum.add(&p, &q, next);
            Ok(())
        })?;
        Ok(sum.mean_kl().max(0.0))
    }

    fn check_interrupt(&self) -> Result<()> {
        match interrupt::flag().load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Interrupted)
                .file(self.writer.part())
                .hint("the same command with --resume goes on")),
            false => Ok(()),
        }
    }
}
