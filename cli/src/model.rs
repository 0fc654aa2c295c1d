//! Opening a model to run it, as several commands do.

use crate::args::Threads;
use crate::failure::Failure;
use crate::files;
use crate::output;
use crate::progress::Bar;
use clap::Args;
use kestrel_formats::Result;
use kestrel_quant::recipe::FileType;
use kestrel_runtime::LoadOptions;
use kestrel_runtime::Model;
use kestrel_runtime::RunnerOptions;
use kestrel_runtime::sampler::Sampler;
use kestrel_runtime::session::{GenerateOptions, Session};
use kestrel_runtime::tokenizer::Tokenizer;
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Which model, and how it runs.
#[derive(Args)]
pub struct ModelArgs {
    /// GGUF file or Hugging Face folder
    #[arg(value_name = "MODEL")]
    pub path: PathBuf,

    #[command(flatten)]
    pub threads: Threads,

    /// Keep activations in f32 where the matrices are quantized; slower, closer to the file's weights
    #[arg(long)]
    pub precise: bool,

    /// Quantize a Hugging Face folder to Q4_K (the output matrix to Q6_K) in memory
    #[arg(long, conflicts_with = "load_in_8bit")]
    pub load_in_4bit: bool,

    /// Quantize a Hugging Face folder to Q8_0 in memory
    #[arg(long)]
    pub load_in_8bit: bool,
}

impl ModelArgs {
    /// Opens the model. A GGUF or an unquantized folder is mapped, which takes no time; a bar shows the rest.
    pub fn open(&self) -> Result<Model> {
        files::check_model_path(&self.path)?;
        let quantize = match (self.load_in_4bit, self.load_in_8bit) {
            (true, _) => Some(FileType::Q4KM),
            (_, true) => Some(FileType::Q8_0),
            _ => None,
        };
        let bar = Bar::new();
        let progress = |done: u64, total: u64| bar.set("quantizing", done, total);
        let model = Model::open(&self.path, &LoadOptions { quantize, progress: Some(&progress) })?;
        output::warnings(&self.path, model.warnings());
        Ok(model)
    }

    /// A session as the arguments say.
    pub fn session<'m>(&self, model: &'m Model) -> Result<Session<'m>> {
        Session::new(
            model,
            &RunnerOptions { threads: self.threads.get(), precise: self.precise, ..Default::default() },
        )
    }
}

/// Generates and prints the text as it comes, asking `go_on` after every piece; returns the number of tokens.
pub fn stream(
    session: &mut Session,
    sampler: &mut Sampler,
    tokenizer: &Tokenizer,
    options: &GenerateOptions,
    go_on: impl Fn() -> Result<()>,
) -> std::result::Result<u64, Failure> {
    let mut n_generated = 0;
    let mut failure = None;
    session.generate(sampler, tokenizer, options, |token, piece| {
        n_generated += u64::from(token.is_some());
        match output::text(piece).and_then(|()| Ok(go_on()?)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                failure = Some(e);
                ControlFlow::Break(())
            }
        }
    })?;
    failure.map_or(Ok(n_generated), Err)
}
