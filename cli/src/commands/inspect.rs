//! `kestrel inspect`: what a model file or folder holds, without computing with it.

use crate::failure::Outcome;
use crate::files;
use crate::output::{self, Table};
use clap::Args;
use kestrel_convert::Source;
use kestrel_formats::WeightType;
use kestrel_formats::calibration::Calibration;
use kestrel_formats::checkpoint::{Checkpoint, SourceTensor};
use kestrel_formats::gguf::{Array, Field, Gguf, Value};
use serde_json::{Value as Json, json};
use std::path::PathBuf;

/// Show metadata, tensors and totals of a GGUF file or a Hugging Face folder
#[derive(Args)]
#[command(after_help = "\
Example:
  kestrel inspect falcon.gguf
  kestrel inspect falcon.gguf --json | jq .totals
  kestrel inspect falcon.calibration.gguf --sensitivity")]
pub struct InspectArgs {
    /// GGUF file or Hugging Face folder
    #[arg(value_name = "FILE.gguf | HF_DIR")]
    model: PathBuf,

    /// Show what a file of `kestrel calibrate` says each type does to the predictions
    #[arg(long)]
    sensitivity: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Elements of an array that are shown.
const ARRAY_HEAD: usize = 6;
/// Characters of a text that are shown in the table.
const TEXT_HEAD: usize = 72;

/// What both kinds of model have.
struct Contents {
    /// Name and value, in the source's order.
    summary: Vec<(&'static str, Json)>,
    /// Key, type and value.
    metadata: Vec<(String, String, Json)>,
    tensors: Vec<Tensor>,
    warnings: Vec<String>,
}

struct Tensor {
    name: String,
    dtype: WeightType,
    shape: Vec<u64>,
    /// File of a folder or of a split model.
    file: String,
    offset: u64,
    /// Scales included, wherever they are.
    n_bytes: u64,
    /// How bitsandbytes quantized it.
    quantization: Option<String>,
}

pub fn run(args: &InspectArgs) -> Outcome {
    if args.sensitivity {
        return sensitivity(args);
    }
    let source = files::open_source(&args.model)?;
    let contents = match &source {
        Source::Gguf(file) => of_gguf(file),
        Source::Checkpoint(folder) => of_checkpoint(folder),
    };
    if args.json {
        return output::json(&contents.to_json());
    }
    output::warnings(&args.model, &contents.warnings);
    output::text(&contents.to_text())
}

/// Mean KL divergence of the model with one matrix alone in each type.
fn sensitivity(args: &InspectArgs) -> Outcome {
    let calibration = Calibration::open(&args.model)?;
    let of = |name: &str| calibration.divergence(name).into_iter().flatten().collect::<Vec<_>>();
    if args.json {
        let matrix = |name: &str| {
            let kl = of(name).into_iter().map(|(ty, kl)| (ty.name().to_owned(), json!(kl)));
            (name.to_owned(), Json::Object(kl.collect()))
        };
        let matrices: serde_json::Map<_, _> = calibration.matrices().map(matrix).collect();
        return output::json(&json!({ "dataset": calibration.dataset(), "mean_kl": matrices }));
    }
    let headings: Vec<String> = calibration.types().iter().map(|ty| format!(">{ty}")).collect();
    let headings: Vec<&str> = ["matrix"].into_iter().chain(headings.iter().map(String::as_str)).collect();
    let mut table = Table::new(&headings);
    for name in calibration.matrices() {
        let kl = of(name);
        let cell = |ty| kl.iter().find(|(t, _)| t == ty).map_or(String::new(), |(_, kl)| format!("{kl:.3e}"));
        table.row([name.to_owned()].into_iter().chain(calibration.types().iter().map(cell)));
    }
    output::text(&table.to_string())
}

fn file_name(path: &std::path::Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn of_gguf(file: &Gguf) -> Contents {
    let tensors = file.tensors().iter().map(|t| Tensor {
        name: t.name.clone(),
        dtype: t.dtype.into(),
        shape: t.shape.clone(),
        file: file_name(file.map_of(t).0.path()),
        offset: t.offset,
        n_bytes: t.n_bytes,
        quantization: None,
    });
    let metadata =
        file.metadata().iter().map(|(key, field)| (key.to_owned(), type_name(&field), field_json(&field)));
    Contents {
        summary: vec![
            ("file", json!(file.path().display().to_string())),
            ("format", json!("GGUF")),
            ("version", json!(file.version())),
            ("alignment", json!(file.alignment())),
            ("file_bytes", json!(file.file_bytes())),
        ],
        metadata: metadata.collect(),
        tensors: tensors.collect(),
        warnings: file.warnings().to_vec(),
    }
}

fn of_checkpoint(folder: &Checkpoint) -> Contents {
    let h = folder.hyperparams();
    let shards = folder.shards();
    let tensors = folder.tensors().iter().map(|t| Tensor {
        name: t.name.clone(),
        dtype: t.dtype,
        shape: t.shape.clone(),
        file: shards.get(t.place.shard).map(|s| file_name(&s.path)).unwrap_or_default(),
        offset: t.place.offset,
        n_bytes: t.n_bytes(),
        quantization: quantization(t),
    });
    let config = [
        ("architecture", json!(format!("{:?}", h.arch))),
        ("model_type", json!(folder.config().model_type)),
        ("d_model", json!(h.d_model)),
        ("d_inner", json!(h.d_inner)),
        ("d_state", json!(h.d_state)),
        ("d_conv", json!(h.d_conv)),
        ("dt_rank", json!(h.dt_rank)),
        ("n_layer", json!(h.n_layer)),
        ("vocab_size", json!(h.vocab_size)),
        ("layer_norm_epsilon", shortest(h.layer_norm_epsilon)),
        ("mixer_rms_eps", shortest(h.mixer_rms_eps)),
        ("tied", json!(folder.tied())),
        ("bos_token_id", json!(folder.generation().bos)),
        ("eos_token_ids", json!(folder.generation().eos)),
        ("quantization_config", folder.config().field("quantization_config").cloned().unwrap_or_default()),
        ("tokenizer", json!(folder.tokenizer().map(|t| format!("{:?}, {} tokens", t.pre, t.tokens.len())))),
    ];
    Contents {
        summary: vec![
            ("file", json!(folder.dir().display().to_string())),
            ("format", json!("Hugging Face")),
            ("shards", json!(shards.len())),
            ("file_bytes", json!(shards.iter().map(|s| s.file_bytes).sum::<u64>())),
        ],
        metadata: config.into_iter().map(|(key, value)| (key.to_owned(), String::new(), value)).collect(),
        tensors: tensors.collect(),
        warnings: folder.warnings().to_vec(),
    }
}

/// Block size, the scales' own quantization and the dtype that weights are rounded to.
fn quantization(t: &SourceTensor) -> Option<String> {
    let state = t.state.as_ref()?;
    Some(match (&state.nested, t.dtype) {
        (_, WeightType::Int8) => "scale per row".to_owned(),
        (None, _) => format!("blocks of {}, {}", state.blocksize, state.dtype),
        (Some(nested), _) => {
            format!(
                "blocks of {}, scales in blocks of {}, {}",
                state.blocksize, nested.blocksize, state.dtype
            )
        }
    })
}

fn type_name(field: &Field) -> String {
    match field.array() {
        Some((element, n)) => format!("{element}[{n}]"),
        None => field.value_type().to_string(),
    }
}

/// The shortest decimal that is this f32, rather than its 17 digits as an f64; null for NaN and infinities.
fn shortest(x: f32) -> Json {
    json!(x.to_string().parse::<f64>().ok().filter(|x| x.is_finite()))
}

/// A scalar as it is; of an array its length and head.
pub(super) fn field_json(field: &Field) -> Json {
    macro_rules! numbers {
        ($value:expr; $($variant:ident),*) => {
            match $value {
                $(Value::$variant(x) => json!(x),)*
                Value::F32(x) => shortest(x),
                Value::Bool(x) => json!(x),
                Value::Str(x) => json!(x),
                Value::Array(array) => match array {
                    $(Array::$variant(x) => json!(x),)*
                    Array::F32(x) => x.into_iter().map(shortest).collect(),
                    Array::Bool(x) => json!(x),
                    Array::Strings(x) => x.iter().map(|s| json!(String::from_utf8_lossy(s))).collect(),
                },
            }
        };
    }
    let head = numbers!(field.head(ARRAY_HEAD); U8, I8, U16, I16, U32, I32, U64, I64, F64);
    match field.array() {
        Some((element, n)) => json!({"element_type": element.to_string(), "len": n, "head": head}),
        None => head,
    }
}

impl Tensor {
    /// Scales included.
    fn bits_per_weight(&self) -> f64 {
        8.0 * self.n_bytes as f64 / self.shape.iter().product::<u64>().max(1) as f64
    }
}

impl Contents {
    /// Per type, in table order: tensors, weights, bytes.
    fn totals(&self) -> Vec<(WeightType, u64, u64, u64)> {
        let of_type = |dtype: WeightType| {
            let tensors = self.tensors.iter().filter(move |t| t.dtype == dtype);
            let sums = |(n, weights, bytes): (u64, u64, u64), t: &Tensor| {
                (n + 1, weights + t.shape.iter().product::<u64>(), bytes + t.n_bytes)
            };
            let (n, weights, bytes) = tensors.fold((0, 0, 0), sums);
            (dtype, n, weights, bytes)
        };
        WeightType::all().map(of_type).filter(|&(_, n, ..)| n > 0).collect()
    }

    fn to_json(&self) -> Json {
        let mut out: serde_json::Map<String, Json> =
            self.summary.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        out.insert(
            "metadata".into(),
            self.metadata.iter().map(|(key, _, v)| (key.clone(), v.clone())).collect(),
        );
        let tensor = |t: &Tensor| {
            let mut entry = json!({"name": t.name, "type": t.dtype.name(), "shape": t.shape, "file": t.file,
                                   "offset": t.offset, "n_bytes": t.n_bytes});
            if let Some(quantization) = &t.quantization {
                entry["quantization"] = json!(quantization);
                entry["bits_per_weight"] = json!(t.bits_per_weight());
            }
            entry
        };
        out.insert("tensors".into(), self.tensors.iter().map(tensor).collect());
        let total = |(dtype, n, weights, bytes): (WeightType, u64, u64, u64)| {
            (dtype.name().to_owned(), json!({"n_tensors": n, "n_weights": weights, "n_bytes": bytes}))
        };
        out.insert("totals".into(), Json::Object(self.totals().into_iter().map(total).collect()));
        out.insert("warnings".into(), json!(self.warnings));
        Json::Object(out)
    }

    fn to_text(&self) -> String {
        let mut out = String::new();
        for (key, value) in &self.summary {
            out.push_str(&format!("{key}: {}\n", show(value)));
        }
        let mut metadata = Table::new(&["metadata", "type", "value"]);
        for (key, ty, value) in &self.metadata {
            metadata.row([key.clone(), ty.clone(), show(value)]);
        }
        let packed = self.tensors.iter().any(|t| t.quantization.is_some());
        let mut columns = vec!["tensor", "type", "shape", ">offset", ">bytes"];
        if packed {
            columns.extend([">bits per weight", "quantization"]);
        }
        let mut tensors = Table::new(&columns);
        for t in &self.tensors {
            let (offset, n_bytes) = (t.offset.to_string(), t.n_bytes.to_string());
            let mut row = vec![t.name.clone(), t.dtype.to_string(), output::shape(&t.shape), offset, n_bytes];
            if packed {
                row.extend([
                    format!("{:.3}", t.bits_per_weight()),
                    t.quantization.clone().unwrap_or_default(),
                ]);
            }
            tensors.row(row);
        }
        let mut totals = Table::new(&["type", ">tensors", ">weights", ">bytes", ">bits per weight"]);
        let mut sum = (0, 0, 0);
        let row = |name: &str, n: u64, weights: u64, bytes: u64| {
            let bits = 8.0 * bytes as f64 / weights.max(1) as f64;
            [name.to_owned(), n.to_string(), weights.to_string(), bytes.to_string(), format!("{bits:.3}")]
        };
        for (dtype, n, weights, bytes) in self.totals() {
            totals.row(row(dtype.name(), n, weights, bytes));
            sum = (sum.0 + n, sum.1 + weights, sum.2 + bytes);
        }
        totals.row(row("all", sum.0, sum.1, sum.2));
        format!("{out}\n{metadata}\n{tensors}\n{totals}")
    }
}

/// A value on one line, long texts and arrays cut.
pub(super) fn show(value: &Json) -> String {
    match value {
        Json::String(text) => cut(&output::printable(text)),
        Json::Object(array) => {
            let head = array.get("head").map(Json::to_string).unwrap_or_default();
            let n = array.get("len").and_then(Json::as_u64).unwrap_or(0);
            let more = if n > ARRAY_HEAD as u64 { " …" } else { "" };
            format!("{}{more}", cut(&head))
        }
        other => other.to_string(),
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(TEXT_HEAD) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
