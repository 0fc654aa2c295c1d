//! The top of the command line, and the arguments that several commands share.

use crate::commands::Command;
use clap::{Args, Parser, ValueEnum};
use kestrel_formats::{GgmlType, WeightType};
use kestrel_quant::recipe::FileType;
use std::path::PathBuf;

/// Shrinks Falcon Mamba 7B and runs it: Hugging Face folder in, quantized GGUF out, text from the mapped file.
#[derive(Parser)]
#[command(name = "kestrel", version, after_help = EXIT_STATUS)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    /// How errors are printed on stderr
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub error_format: ErrorFormat,

    /// Print notes (seed, timings, plans) on stderr even if it is no terminal
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

const EXIT_STATUS: &str = "\
Example:
  kestrel demo

Exit status:
  0 done, 2 bad input or usage, 3 I/O error, 4 resource limit, 70 a bug in kestrel, 130 interrupted

Environment:
  KESTREL_ISA  forces an instruction set: scalar, avx2, avx512 or neon";

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ErrorFormat {
    /// One line
    #[default]
    Text,
    /// One JSON object on one line
    Json,
}

#[derive(Args)]
pub struct Threads {
    /// Worker threads [default: as many as the machine runs at once]
    #[arg(short = 't', long = "threads", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    n_threads: Option<u16>,
}

impl Threads {
    pub fn get(&self) -> usize {
        self.n_threads
            .map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from)
    }
}

/// Several numbers of threads, one after the other.
#[derive(Args)]
pub struct ThreadCounts {
    /// Worker threads, or several numbers of them to compare [default: as many as the machine runs at once]
    #[arg(short = 't', long = "threads", value_name = "N,...", value_delimiter = ',',
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    n_threads: Vec<u16>,
}

impl ThreadCounts {
    /// At least one number.
    pub fn get(&self) -> Vec<usize> {
        match self.n_threads.is_empty() {
            true => vec![Threads { n_threads: None }.get()],
            false => self.n_threads.iter().copied().map(usize::from).collect(),
        }
    }
}

/// What `convert` and `quantize` have in common.
#[derive(Args)]
pub struct ConversionArgs {
    /// File to write, or folder for the bnb types; it appears when it is complete
    #[arg(short, long, value_name = "OUT", required_unless_present = "dry_run")]
    pub output: Option<PathBuf>,

    /// Type of most tensors, as llama-quantize spells it: f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k_s
    /// q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl iq4_xs; or a checkpoint folder as bitsandbytes saves it:
    /// bnb-nf4 bnb-fp4 bnb-int8 (convert only)
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_output_type)]
    pub output_type: OutputType,

    /// Another type for the tensors whose GGUF name the regular expression finds; the first match wins (repeatable)
    #[arg(long, value_name = "REGEX=TYPE", value_parser = parse_override)]
    pub tensor_type: Vec<(String, GgmlType)>,

    /// Importance matrix of kestrel imatrix or llama-imatrix, GGUF or .dat
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,

    #[command(flatten)]
    pub threads: Threads,

    /// Print what would be written and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Replace OUT if it exists
    #[arg(long)]
    pub force: bool,
}

/// Text from the command line or a file.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct TextArgs {
    /// The text
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,

    /// A file that holds the text; - is stdin
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// What a conversion makes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum OutputType {
    /// A GGUF file.
    Gguf(FileType),
    /// A checkpoint folder of bitsandbytes.
    Bnb(WeightType),
}

const BNB_TYPES: [(&str, WeightType); 3] =
    [("bnb-nf4", WeightType::Nf4), ("bnb-fp4", WeightType::Fp4), ("bnb-int8", WeightType::Int8)];

fn parse_output_type(name: &str) -> Result<OutputType, String> {
    if let Some((_, ty)) = BNB_TYPES.iter().find(|(bnb, _)| bnb.eq_ignore_ascii_case(name)) {
        return Ok(OutputType::Bnb(*ty));
    }
    FileType::parse(name).map(OutputType::Gguf).map_err(|_| {
        let names: Vec<_> =
            FileType::all().map(FileType::name).chain(BNB_TYPES.map(|(name, _)| name)).collect();
        format!("the types are {}", names.join(" "))
    })
}

/// `REGEX=TYPE`; the regular expression may contain `=` itself.
fn parse_override(text: &str) -> Result<(String, GgmlType), String> {
    let (pattern, name) = text.rsplit_once('=').ok_or("expected REGEX=TYPE")?;
    if pattern.is_empty() {
        return Err("the regular expression is empty; . matches every tensor".into());
    }
    let dtype = GgmlType::from_name(name).ok_or_else(|| {
        let names: Vec<_> = GgmlType::all().map(|t| t.name().to_lowercase()).collect();
        format!("the types of a tensor are {}", names.join(" "))
    })?;
    Ok((pattern.to_owned(), dtype))
}
