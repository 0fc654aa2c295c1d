//! The top of the command line, and the arguments that several commands share.

use crate::commands::Command;
use clap::{Args, Parser, ValueEnum};
use kestrel_convert::Target;
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
  KESTREL_ISA  forces an instruction set: scalar, scalar_int8, avx2, avx512, amx or neon";

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
    /// q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl iq4_xs; or our mixes ssm_s ssm_m ssm_l; or a checkpoint folder as bitsandbytes saves it:
    /// bnb-nf4 bnb-fp4 bnb-int8 (convert only)
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_output_type)]
    #[arg(required_unless_present_any = ["target_size", "target_bpw", "target_kl"])]
    pub output_type: Option<OutputType>,

    /// Another type for the tensors whose GGUF name the regular expression finds; the first match wins (repeatable)
    #[arg(long, value_name = "REGEX=TYPE", value_parser = parse_override)]
    pub tensor_type: Vec<(String, GgmlType)>,

    /// Importance matrix of kestrel imatrix or llama-imatrix, GGUF or .dat
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,

    /// Quantize with error feedback, by what `kestrel calibrate` measured
    #[arg(long, value_name = "FILE", conflicts_with = "imatrix")]
    pub calibration: Option<PathBuf>,

    /// With --calibration: go on from OUT.part, if an interrupted run left it
    #[arg(long, requires = "calibration")]
    pub resume: bool,

    /// With --calibration: after error feedback, change single codes and scales as long as that brings the outputs of
    /// the matrix closer
    #[arg(long, value_enum, default_value_t, value_name = "HOW")]
    pub search: Search,

    /// With --calibration: choose types so that the file has at most this size (4139360, 4.0GB, 3.9GiB, 800MB) and
    /// diverges as little as possible
    #[arg(long, value_name = "SIZE", value_parser = parse_size, group = "target")]
    pub target_size: Option<u64>,

    /// The same for a number of bits per weight, everything in the file counted
    #[arg(long, value_name = "BITS", value_parser = parse_positive, group = "target")]
    pub target_bpw: Option<f64>,

    /// With --calibration: choose types so that the file is as small as it can be at this predicted KL divergence
    #[arg(long, value_name = "NATS", value_parser = parse_positive, group = "target")]
    pub target_kl: Option<f64>,

    #[command(flatten)]
    pub threads: Threads,

    /// Print what would be written and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Replace OUT if it exists
    #[arg(long)]
    pub force: bool,
}

impl ConversionArgs {
    /// What is made; where types are chosen, what is not chosen for is as in q4_k_m.
    pub fn output_type(&self) -> OutputType {
        self.output_type.unwrap_or(OutputType::Gguf(FileType::Q4KM))
    }

    /// What the file must keep to.
    pub fn target(&self) -> Option<Target> {
        let size = self.target_size.map(Target::Bytes);
        size.or(self.target_bpw.map(Target::BitsPerWeight)).or(self.target_kl.map(Target::Kl))
    }
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

/// How long codes and scales are searched.
#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Search {
    /// The type's own search, and error feedback if there is a calibration
    #[default]
    Fast,
    /// Then single codes and scales in turns
    Best,
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

/// Bytes, or a number with a unit; `GB` is 10^9 and `GiB` 2^30.
fn parse_size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 8] = [
        ("kib", 1024.0),
        ("mib", 1_048_576.0),
        ("gib", 1_073_741_824.0),
        ("kb", 1e3),
        ("mb", 1e6),
        ("gb", 1e9),
        ("b", 1.0),
        ("", 1.0),
    ];
    let lower = text.trim().to_ascii_lowercase();
    let unit = UNITS.iter().find_map(|(name, factor)| Some((lower.strip_suffix(name)?, factor)));
    let number = unit.and_then(|(number, factor)| Some(number.trim().parse::<f64>().ok()? * factor));
    match number {
        Some(n) if (1.0..=1e18).contains(&n) => Ok(n as u64),
        _ => Err("expected bytes, or a number with kB, MB, GB, KiB, MiB or GiB".into()),
    }
}

fn parse_positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("expected a number above 0".into()),
    }
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
