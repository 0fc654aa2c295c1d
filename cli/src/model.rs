//! Opening a model to run it, as several commands do.

use crate::args::Threads;
use crate::failure::Failure;
use crate::files;
use crate::output;
use crate::progress::Bar;
use clap::{Args, ValueEnum};
use kestrel_formats::{Result, WeightType};
use kestrel_quant::recipe::{Bnb, FileType};
use kestrel_runtime::Model;
use kestrel_runtime::RunnerOptions;
use kestrel_runtime::sampler::Sampler;
use kestrel_runtime::session::{GenerateOptions, Session};
use kestrel_runtime::tokenizer::Tokenizer;
use kestrel_runtime::{LoadOptions, Quantize};
use std::ops::ControlFlow;
use std::path::PathBuf;

/// The block size that transformers gives bitsandbytes.
pub const BNB_BLOCKSIZE: usize = 64;

/// Which model, and how it runs; `T` says with how many threads.
#[derive(Args)]
pub struct ModelArgs<T: Args = Threads> {
    /// GGUF file or Hugging Face folder
    #[arg(value_name = "MODEL")]
    pub path: PathBuf,

    #[command(flatten)]
    pub threads: T,

    /// Keep activations in f32 where the matrices are quantized; slower, closer to the file's weights
    #[arg(long)]
    pub precise: bool,

    /// Quantize a Hugging Face folder to 4 bits in memory: to Q4_K (the output matrix to Q6_K), or as
    /// --bnb-4bit-quant-type says
    #[arg(long, conflicts_with = "load_in_8bit")]
    pub load_in_4bit: bool,

    /// Quantize a Hugging Face folder to 8 bits in memory: to Q8_0, or as --quant-type says
    #[arg(long)]
    pub load_in_8bit: bool,

    /// With --load-in-4bit: quantize the matrices that bitsandbytes quantizes, as it does
    #[arg(long, value_enum, value_name = "TYPE", requires = "load_in_4bit")]
    pub bnb_4bit_quant_type: Option<Bnb4bitType>,

    /// With --bnb-4bit-quant-type: quantize the scales too
    #[arg(long, requires = "bnb_4bit_quant_type")]
    pub bnb_4bit_use_double_quant: bool,

    /// With --load-in-8bit: the type, Q8_0 or that of bitsandbytes' LLM.int8
    #[arg(long, value_enum, value_name = "TYPE", requires = "load_in_8bit")]
    pub quant_type: Option<EightBitType>,
}

/// The 4-bit types of bitsandbytes.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Bnb4bitType {
    Nf4,
    Fp4,
}

/// Types of 8 bits.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EightBitType {
    #[value(name = "q8_0")]
    Q8_0,
    Int8,
}

impl<T: Args> ModelArgs<T> {
    /// Opens the model. A GGUF or an unquantized folder is mapped, and read if the page cache does not hold it; a bar shows
    /// quantizing.
    pub fn open(&self) -> Result<Model> {
        files::check_model_path(&self.path)?;
        let quantize = self.quantize();
        let bar = Bar::new();
        let progress = |done: u64, total: u64| bar.set("quantizing", done, total);
        let progress = quantize.is_some().then_some(&progress as _);
        let model = Model::open(&self.path, &LoadOptions { quantize, progress })?;
        output::warnings(&self.path, model.warnings());
        Ok(model)
    }

    /// What becomes of the matrices at load.
    fn quantize(&self) -> Option<Quantize> {
        let bnb = |dtype| {
            let double_quant = self.bnb_4bit_use_double_quant;
            Quantize::Bnb(Bnb { dtype, blocksize: BNB_BLOCKSIZE, double_quant })
        };
        if self.load_in_4bit {
            return Some(match self.bnb_4bit_quant_type {
                None => Quantize::Ggml(FileType::Q4KM),
                Some(Bnb4bitType::Nf4) => bnb(WeightType::Nf4),
                Some(Bnb4bitType::Fp4) => bnb(WeightType::Fp4),
            });
        }
        self.load_in_8bit.then(|| match self.quant_type {
            None | Some(EightBitType::Q8_0) => Quantize::Ggml(FileType::Q8_0),
            Some(EightBitType::Int8) => bnb(WeightType::Int8),
        })
    }

    /// A session with so many threads, otherwise as the arguments say.
    pub fn session_with<'m>(&self, model: &'m Model, threads: usize) -> Result<Session<'m>> {
        Session::new(model, &self.runner_options(threads))
    }

    /// How to run with so many threads.
    pub fn runner_options(&self, threads: usize) -> RunnerOptions {
        RunnerOptions { threads, precise: self.precise, ..Default::default() }
    }
}

impl ModelArgs {
    /// A session as the arguments say.
    pub fn session<'m>(&self, model: &'m Model) -> Result<Session<'m>> {
        self.session_with(model, self.threads.get())
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
