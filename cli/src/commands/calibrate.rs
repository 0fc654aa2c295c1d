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
use kestrel_runtime::evaluate::{Divergence, log_softmax, scored};
use kestrel_runtime::observe::ColumnProducts;
use kestrel_runtime::probe::{Probe, Quantizer};
use kestrel_runtime::state::checksum;
use kestrel_runtime::{Model, RunnerOptions};
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
/// matrix in turn quantized; meanwhile OUT.part also holds what the model predicts, 75 MB per window of the 7B. An
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
        let windows: Vec<_> = self.windows.iter().take(self.args.kl_chunks as usize).collect();
        let mut base = Base::new(self, model, &windows)?;
        for (role, layer, m) in missing {
            self.check_interrupt()?;
            let feedback = so_far.products(&m.name).map(|products| Feedback::new(&products)).transpose();
            let feedback =
                feedback.map_err(|e| e.file(so_far.path()).what(format!("products of \"{}\"", m.name)))?;
            let quantizer = Quantizer { feedback: feedback.as_ref() };
            let Some(matrix) = model.matrix(*role, *layer) else { continue };
            let fits = |ty: GgmlType| m.cols.is_multiple_of(ty.block_len());
            let probe = if fits(PROBE) { PROBE } else { GgmlType::Q4_0 };
            let mut tried: Vec<_> = TYPES.into_iter().filter(|&ty| fits(ty)).collect();
            if !tried.contains(&probe) {
                tried.push(probe);
            }
            let errors = quantizer.errors(matrix, &tried);
            let error = |ty| tried.iter().position(|&t| t == ty).map(|i| errors[i]);
            let probe_error = error(probe).unwrap_or_default();
            let new = quantizer.requantized(matrix, probe)?;
            let unchanged = match role {
                Role::TokenEmbd => None,
                Role::Output => Some(model.hparams().n_layer),
                _ => Some(*layer),
            };
            if let Some(layer) = unchanged {
                base.reach(model, layer)?;
            }
            let old = model.replace_matrix(*role, *layer, new);
            let kl = base.divergence(model, unchanged);
            model.replace_matrix(*role, *layer, old);
            let kl = kl?;
            let all = TYPES.map(|ty| match error(ty) {
                None => f32::INFINITY,
                // A matrix that is all zero has no error in any type.
                Some(_) if probe_error == 0.0 => 0.0,
                Some(error) => (kl * (error / probe_error)) as f32,
            });
            self.writer.divergence(&m.name, &all)?;
            bar.advance(1, &format!("{} as {probe}: KL {kl:.2e}", m.name));
        }
        Ok(())
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

/// What the unchanged model makes of the windows that divergences are measured on. It is set aside on disk: of eight
/// windows of the 7B that is 600 MB, more than half of what the command may take of memory. For each window, the
/// log-probabilities (scored, vocab) in f32, then the residual stream (t, d_model) before the layer that is being tried.
struct Base<'a> {
    work: &'a Work<'a>,
    windows: &'a [Vec<u32>],
    /// The layer that residual streams were set aside before.
    layer: usize,
    /// A residual stream (t, d_model) at work.
    x: Vec<f32>,
    aside: Aside<'a>,
}

impl<'a> Base<'a> {
    /// Reads the windows to their end.
    fn new(work: &'a Work<'a>, model: &Model, windows: &'a [Vec<u32>]) -> Result<Self> {
        let aside = Aside { writer: work.writer, bytes: Vec::new() };
        let (h, x) = (model.hparams(), Vec::new());
        let mut out = Self { work, windows, layer: h.n_layer, x, aside };
        let mut probe = out.probe(model)?;
        let mut log_probs = vec![0.0; h.vocab_size];
        for (w, window) in windows.iter().enumerate() {
            probe.embed(window, &mut out.x)?;
            probe.advance(0..h.n_layer, &mut out.x);
            out.aside.put(out.x_place(model, w), out.x.iter().copied())?;
            let (scored, first) = (scored(window.len()), out.place(model, w));
            probe.logits(&out.x, scored.clone(), |i, logits| {
                log_softmax(logits, &mut log_probs);
                let place = first + (i - scored.start) * h.vocab_size;
                out.aside.put(place, log_probs.iter().map(|&x| x as f32))
            })?;
        }
        Ok(out)
    }

    /// With f32 activations, since the divergence is that of weights.
    fn probe<'m>(&self, model: &'m Model) -> Result<Probe<'m>> {
        let args = &self.work.args.model;
        Probe::new(model, &RunnerOptions { precise: true, ..args.runner_options(args.threads.get()) })
    }

    /// Numbers before a window's log-probabilities.
    fn place(&self, model: &Model, window: usize) -> usize {
        let (h, n_ctx) = (model.hparams(), self.work.windows.n_ctx);
        window * (scored(n_ctx).len() * h.vocab_size + n_ctx * h.d_model)
    }

    /// Numbers before its residual stream.
    fn x_place(&self, model: &Model, window: usize) -> usize {
        self.place(model, window) + scored(self.work.windows.n_ctx).len() * model.hparams().vocab_size
    }

    /// Takes the residual streams to before this layer, from where they are or else from the embedding.
    fn reach(&mut self, model: &Model, layer: usize) -> Result<()> {
        if layer == self.layer {
            return Ok(());
        }
        let mut probe = self.probe(model)?;
        let unchanged = (self.layer < layer).then_some(self.layer);
        for w in 0..self.windows.len() {
            let from = self.read(model, &probe, w, unchanged)?;
            probe.advance(from..layer, &mut self.x);
            self.aside.put(self.x_place(model, w), self.x.iter().copied())?;
        }
        self.layer = layer;
        Ok(())
    }

    /// A window's residual stream before layer `unchanged`, where it was set aside, or else before the first; returns which.
    fn read(
        &mut self,
        model: &Model,
        probe: &Probe<'_>,
        window: usize,
        unchanged: Option<usize>,
    ) -> Result<usize> {
        let Some(layer) = unchanged else {
            probe.embed(&self.windows[window], &mut self.x)?;
            return Ok(0);
        };
        debug_assert_eq!(layer, self.layer);
        self.x.resize(self.windows[window].len() * model.hparams().d_model, 0.0);
        self.aside.get(self.x_place(model, window), &mut self.x)?;
        Ok(layer)
    }

    /// Mean divergence of a model that is the same before layer `unchanged`, which was [reached](Self::reach), or that has
    /// another embedding.
    fn divergence(&mut self, model: &Model, unchanged: Option<usize>) -> Result<f64> {
        let (n_layer, vocab) = (model.hparams().n_layer, model.hparams().vocab_size);
        let mut sum = Divergence::default();
        let (mut p, mut q, mut base) = (vec![0.0; vocab], vec![0.0; vocab], vec![0.0; vocab]);
        let mut probe = self.probe(model)?;
        for (w, window) in self.windows.iter().enumerate() {
            let from = self.read(model, &probe, w, unchanged)?;
            probe.advance(from..n_layer, &mut self.x);
            let (scored, first) = (scored(window.len()), self.place(model, w));
            probe.logits(&self.x, scored.clone(), |i, logits| {
                self.aside.get(first + (i - scored.start) * vocab, &mut base)?;
                log_softmax(logits, &mut q);
                // Normalized again, or the rounding of the base would show.
                log_softmax(&base, &mut p);
                sum.add(&p, &q, window[i + 1]);
                Ok(())
            })?;
        }
        Ok(sum.mean_kl().max(0.0))
    }
}

/// f32 numbers behind the end of the calibration.
struct Aside<'a> {
    writer: &'a CalibrationWriter,
    bytes: Vec<u8>,
}

impl Aside<'_> {
    /// Keeps numbers at a place.
    fn put(&mut self, place: usize, numbers: impl Iterator<Item = f32>) -> Result<()> {
        self.bytes.clear();
        self.bytes.extend(numbers.flat_map(f32::to_le_bytes));
        self.writer.set_aside(4 * place as u64, &self.bytes)
    }

    /// Those that were put there.
    fn get(&mut self, place: usize, numbers: &mut [f32]) -> Result<()> {
        self.bytes.resize(size_of_val(numbers), 0);
        self.writer.read_aside(4 * place as u64, &mut self.bytes)?;
        let words = self.bytes.as_chunks().0;
        numbers.iter_mut().zip(words).for_each(|(x, word)| *x = f32::from_le_bytes(*word));
        Ok(())
    }
}
