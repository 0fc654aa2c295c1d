//! `kestrel imatrix`: which columns of each matrix matter, measured on a text.

use crate::failure::Outcome;
use crate::model::ModelArgs;
use crate::progress::Count;
use crate::windows::Windows;
use crate::{files, interrupt, output};
use clap::Args;
use kestrel_formats::atomic_file::{check_target, interrupted_run, other_run, part_of};
use kestrel_formats::imatrix::{Imatrix, Origin};
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::Model;
use kestrel_runtime::observe::ColumnEnergy;
use kestrel_runtime::state::checksum;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What was measured so far is written this often, so that a crash loses no more.
const SAVE_EVERY: Duration = Duration::from_secs(60);

/// Measure an importance matrix on a text, for --imatrix of convert and quantize
///
/// The mean squared input of every column of ssm_in, ssm_x, ssm_dt, ssm_out and output, over windows of --ctx tokens
/// that do not overlap, each from an empty state. The file is that of llama-imatrix, and llama-quantize takes it.
/// Ctrl-C leaves what was measured in OUT.part, from which --resume goes on.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel imatrix falcon-bf16.gguf -f calibration.txt -o falcon.imatrix.gguf --chunks 100
  kestrel quantize falcon-bf16.gguf -o falcon.gguf --type q4_k_m --imatrix falcon.imatrix.gguf

Beside quantized weights the inputs are measured as they are multiplied, in int8, unless --precise is given.")]
pub struct ImatrixArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// The text, UTF-8; - is stdin
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,

    /// File to write
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,

    /// Tokens of a window
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    ctx: u32,

    /// Read only the first N windows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,

    /// Go on from OUT.part, if it is there
    #[arg(long)]
    resume: bool,

    /// Replace OUT if it exists
    #[arg(long)]
    force: bool,
}

pub fn run(args: &ImatrixArgs) -> Outcome {
    let target = check_target(&args.output, args.force)?;
    let part = part_of(&target);
    let text = files::read_text(&args.file)?;
    let model = args.model.open()?;
    let windows = Windows::of_text(&args.file, &text, &model.tokenizer()?, args.ctx, args.chunks)?;
    let sums = ColumnEnergy::new(model.is_tied());
    let mut work = Work { args, model: &model, windows: &windows, done: 0, sums };
    work.begin(&part)?;

    let mut session = args.model.session(&model)?;
    let bar = Count::new("windows", windows.len(), work.done);
    interrupt::writing(&target);
    let stop = interrupt::flag();
    let mut saved = Instant::now();
    for window in windows.iter().skip(work.done) {
        if stop.load(Ordering::SeqCst) {
            return Err(work.interrupted(&part)?.into());
        }
        if saved.elapsed() > SAVE_EVERY {
            work.matrix()?.write(&part, true)?;
            saved = Instant::now();
        }
        session.reset();
        session.observe(&window, &mut work.sums)?;
        work.done += 1;
        bar.advance(1, "measured");
    }
    drop(bar);
    model.check_unchanged()?;
    let matrix = work.matrix()?;
    matrix.write(&target, args.force)?;
    // What it holds is in the output now; that it may not be there is no error.
    let _ = std::fs::remove_file(&part);
    output::note(&format!(
        "{}: {} matrices, {} windows of {}",
        target.display(),
        matrix.len(),
        work.done,
        args.ctx
    ));
    Ok(())
}

/// A measurement under way.
struct Work<'a> {
    args: &'a ImatrixArgs,
    model: &'a Model,
    windows: &'a Windows,
    /// Windows measured.
    done: usize,
    sums: ColumnEnergy,
}

impl Work<'_> {
    /// What was measured, as a file holds it. Errors: `NotFinite` if an input was not.
    fn matrix(&self) -> Result<Imatrix> {
        let dataset = self.args.file.display().to_string();
        let mut out = Imatrix::new(&dataset, self.done as u32, self.args.ctx, self.origin(self.done));
        for (name, sums, count) in self.sums.sums() {
            out.insert(name.to_owned(), sums.to_vec(), count).map_err(|e| {
                e.file(self.model.path()).hint("the weights are damaged; `kestrel verify` finds where")
            })?;
        }
        Ok(out)
    }

    /// The model, and the tokens of the first `n` windows.
    fn origin(&self, n: usize) -> Origin {
        let tokens = &self.windows.tokens;
        let read = &tokens[..(n * self.windows.n_ctx).min(tokens.len())];
        let bytes: Vec<u8> = read.iter().flat_map(|t| t.to_le_bytes()).collect();
        Origin { model: self.model.fingerprint(), tokens: checksum(&bytes) }
    }

    /// Takes over what an interrupted run left. Errors: `OutputExists` if there is something and `--resume` was not
    /// given, `Inconsistent` if it is of another model or text.
    fn begin(&mut self, part: &Path) -> Result<()> {
        if !part.exists() {
            return Ok(());
        }
        if !self.args.resume {
            return Err(interrupted_run(part));
        }
        let left = Imatrix::open(part)?;
        let done = left.chunks().unwrap_or(0) as usize;
        let matches = left.chunk_size() == Some(self.args.ctx) && left.origin() == Some(self.origin(done));
        if !matches || done > self.windows.len() {
            return Err(other_run(part, "one of the same weights, text, --ctx and at most --chunks"));
        }
        left.sums().for_each(|(name, sums, count)| self.sums.add(name, sums, count));
        self.done = done;
        Ok(())
    }

    /// Keeps what was measured and says so.
    fn interrupted(&self, part: &Path) -> Result<Error> {
        let error = Error::new(ErrorKind::Interrupted);
        if self.done == 0 {
            return Ok(error);
        }
        self.matrix()?.write(part, true)?;
        Ok(error
            .file(part)
            .found(format!("{} of {} windows", self.done, self.windows.len()))
            .hint("the same command with --resume goes on"))
    }
}
