//! `kestrel diff`: two GGUF files side by side.

use super::inspect::{field_json, show};
use crate::args::Threads;
use crate::failure::Outcome;
use crate::interrupt;
use crate::output::{self, Table};
use crate::progress::Count;
use clap::Args;
use kestrel_convert::{TensorDiff, diff};
use kestrel_formats::gguf::{Gguf, TensorInfo};
use serde_json::{Value as Json, json};
use std::path::PathBuf;

/// Compare two GGUF files: metadata, and types, shapes and numbers of the tensors
///
/// RMSE and relative error are those of B's numbers against A's, both as they dequantize. Differences are no failure:
/// the exit status is 0.
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel diff falcon-bf16.gguf falcon-q4_k_m.gguf
  kestrel diff ours.gguf theirs.gguf --json")]
pub struct DiffArgs {
    /// GGUF file, or the first of a split one
    #[arg(value_name = "A.gguf")]
    a: PathBuf,

    /// Another one
    #[arg(value_name = "B.gguf")]
    b: PathBuf,

    #[command(flatten)]
    threads: Threads,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &DiffArgs) -> Outcome {
    let (a, b) = (Gguf::open(&args.a)?, Gguf::open(&args.b)?);
    let bar = Count::new("tensors", a.tensors().len(), 0);
    let tensors = diff(&a, &b, args.threads.get(), interrupt::flag(), &|| bar.advance(1, "compared"))?;
    drop(bar);
    a.check_unchanged()?;
    b.check_unchanged()?;
    let metadata = metadata(&a, &b);
    match args.json {
        true => output::json(&to_json(&metadata, &tensors)),
        false => output::text(&to_text(&metadata, &tensors)),
    }
}

/// A key of either file.
struct Pair {
    key: String,
    same: bool,
    /// The value in each file, arrays cut.
    values: [Option<Json>; 2],
}

/// Every key in the order of A, then those that only B has.
fn metadata(a: &Gguf, b: &Gguf) -> Vec<Pair> {
    let only_b = b.metadata().iter().filter(|(key, _)| !a.metadata().contains(key));
    let keys = a.metadata().iter().chain(only_b).map(|(key, _)| key);
    keys.map(|key| {
        let fields = [a, b].map(|file| file.metadata().field(key));
        let [of_a, of_b] = fields.each_ref().map(|f| f.as_ref().map(|f| f.value()));
        Pair { key: key.to_owned(), same: of_a == of_b, values: fields.map(|f| Some(field_json(&f?))) }
    })
    .collect()
}

fn info_json(info: &Option<TensorInfo>) -> Json {
    match info {
        None => Json::Null,
        Some(t) => json!({"type": t.dtype.name(), "shape": t.shape, "n_bytes": t.n_bytes}),
    }
}

fn to_json(metadata: &[Pair], tensors: &[TensorDiff]) -> Json {
    let key = |p: &Pair| json!({"key": p.key, "same": p.same, "a": p.values[0], "b": p.values[1]});
    let tensor = |t: &TensorDiff| {
        let mut out = json!({"name": t.name, "a": info_json(&t.a), "b": info_json(&t.b)});
        if let Some(stats) = &t.stats {
            out["rmse"] = json!(stats.rmse());
            out["relative_rmse"] = json!(stats.relative_rmse());
            out["max_abs"] = json!(stats.max_abs);
            out["n_not_finite"] = json!(stats.n_nan + stats.n_inf);
        }
        out
    };
    json!({
        "metadata": metadata.iter().map(key).collect::<Vec<_>>(),
        "tensors": tensors.iter().map(tensor).collect::<Vec<_>>(),
    })
}

fn to_text(metadata: &[Pair], tensors: &[TensorDiff]) -> String {
    let mut keys = Table::new(&["metadata", "A", "B"]);
    let (same, others): (Vec<_>, Vec<_>) = metadata.iter().partition(|p| p.same);
    for p in &others {
        let [a, b] = p.values.each_ref().map(|v| v.as_ref().map_or("-".to_owned(), show));
        keys.row([p.key.clone(), a, b]);
    }
    let mut table = Table::new(&["tensor", "shape", "A", "B", ">RMSE", ">relative", ">max"]);
    for t in tensors {
        let dtype = |info: &Option<TensorInfo>| info.as_ref().map_or("-", |t| t.dtype.name()).to_owned();
        let shape = match (&t.a, &t.b) {
            (Some(a), Some(b)) if a.shape != b.shape => {
                format!("{} / {}", output::shape(&a.shape), output::shape(&b.shape))
            }
            (Some(t), _) | (_, Some(t)) => output::shape(&t.shape),
            _ => String::new(),
        };
        let figures = match &t.stats {
            None => ["-".to_owned(), "-".to_owned(), "-".to_owned()],
            Some(s) => [
                format!("{:.3e}", s.rmse()),
                format!("{:.3e}", s.relative_rmse()),
                match s.n_nan + s.n_inf {
                    0 => format!("{:.3e}", s.max_abs),
                    n => format!("{n} not finite"),
                },
            ],
        };
        table.row([t.name.clone(), shape, dtype(&t.a), dtype(&t.b)].into_iter().chain(figures));
    }
    let n_differ = tensors.iter().filter(|t| t.differs()).count();
    format!(
        "{keys}{} of {} keys differ\n\n{table}{n_differ} of {} tensors differ\n",
        others.len(),
        same.len() + others.len(),
        tensors.len()
    )
}
