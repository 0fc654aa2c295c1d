//! `config.json` and `generation_config.json`.
//!
//! Defaults and their source: transformers 5.23, `MambaConfig` and `FalconMambaConfig`. The second names of fields
//! (`d_model`, `n_layer`, …) are those that llama.cpp's converter also takes.

use super::bitsandbytes::Declared;
use crate::arch::{Arch, HyperParams};
use crate::json::{describe, parse_object, shorten};
use crate::limits::{D_CONV_MAX, D_STATE_MAX, LAYERS_MAX, VOCAB_MAX, WIDTH_MAX};
use crate::{Error, ErrorKind, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// What is read, for error messages.
const SUPPORTED: &str =
    "FalconMambaForCausalLM (model_type falcon_mamba) or MambaForCausalLM (model_type mamba)";
/// Rows of the embedding of every Falcon Mamba that TII published. State-spaces' Mamba has 50280 or 50288.
const FALCON_VOCAB: usize = 65_024;

/// A parsed config.json.
#[derive(Clone, Debug)]
pub struct Config {
    path: PathBuf,
    fields: Map<String, Value>,
    /// `model_type`: `falcon_mamba` or `mamba`.
    pub model_type: String,
    /// `architectures`, as written; may be empty.
    pub architectures: Vec<String>,
    /// `torch_dtype` or `dtype`, as written.
    pub torch_dtype: Option<String>,
    /// `_name_or_path`, as written.
    pub name: Option<String>,
    /// `tie_word_embeddings` if it is written. Absent means true in both architectures.
    pub tie_word_embeddings: Option<bool>,
    /// The special ids it names.
    pub ids: GenerationConfig,
    /// What `quantization_config` says, if there is one.
    pub quantization: Option<Declared>,
}

/// Special token ids, as generation_config.json has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GenerationConfig {
    /// Begin of text.
    pub bos: Option<u32>,
    /// Every id that ends a generation, in the order of the file; the instruct models have two.
    pub eos: Vec<u32>,
    /// Padding.
    pub pad: Option<u32>,
}

impl GenerationConfig {
    /// Parses generation_config.json; `WrongType` for an id that is none.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::from_fields(&parse_object(bytes, path)?).map_err(|e| e.file(path))
    }

    fn from_fields(fields: &Map<String, Value>) -> Result<Self> {
        let one = |field: &str| fields.get(field).filter(|v| !v.is_null()).map(|v| id(field, v)).transpose();
        let eos = match fields.get("eos_token_id") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(ids)) => {
                let mut out = Vec::new();
                for value in ids {
                    let id = id("eos_token_id", value)?;
                    if !out.contains(&id) {
                        out.push(id);
                    }
                    if out.len() > 64 {
                        return Err(Error::new(ErrorKind::Limit)
                            .what("eos_token_id")
                            .expected("at most 64 ids"));
                    }
                }
                out
            }
            Some(value) => vec![id("eos_token_id", value)?],
        };
        Ok(Self { bos: one("bos_token_id")?, eos, pad: one("pad_token_id")? })
    }

    /// These ids, with those of `other` where this has none.
    pub(crate) fn or(self, other: &Self) -> Self {
        Self {
            bos: self.bos.or(other.bos),
            eos: if self.eos.is_empty() { other.eos.clone() } else { self.eos },
            pad: self.pad.or(other.pad),
        }
    }
}

fn id(field: &str, value: &Value) -> Result<u32> {
    value.as_u64().and_then(|x| u32::try_from(x).ok()).ok_or_else(|| {
        Error::new(ErrorKind::WrongType).what(field).expected("a token id").found(describe(value))
    })
}

impl Config {
    /// Parses config.json and refuses every architecture and option that is not implemented.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::from_fields(parse_object(bytes, path)?, path).map_err(|e| e.file(path))
    }

    fn from_fields(fields: Map<String, Value>, path: &Path) -> Result<Self> {
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        let architectures: Vec<String> = match fields.get("architectures") {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            _ => Vec::new(),
        };
        let model_type = text("model_type").ok_or_else(|| {
            Error::new(ErrorKind::Missing)
                .what("model_type")
                .expected(SUPPORTED)
                .hint("state-spaces' original files have none; use the repositories whose names end in -hf")
        })?;
        let config = Self {
            path: path.to_owned(),
            architectures,
            model_type,
            torch_dtype: text("torch_dtype").or_else(|| text("dtype")),
            name: text("_name_or_path").filter(|name| !name.is_empty()),
            tie_word_embeddings: flag(&fields, "tie_word_embeddings")?,
            ids: GenerationConfig::from_fields(&fields)?,
            quantization: fields
                .get("quantization_config")
                .filter(|config| !config.is_null())
                .map(Declared::parse)
                .transpose()?,
            fields,
        };
        config.check_supported()?;
        Ok(config)
    }

    /// All fields as written.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The raw value of a field.
    pub fn field(&self, name: &str) -> Option<&Value> {
        self.fields.get(name)
    }

    fn check_supported(&self) -> Result<()> {
        let unsupported = |what: &str| Error::new(ErrorKind::Unsupported).what(what);
        if !matches!(self.model_type.as_str(), "falcon_mamba" | "mamba") {
            return Err(unsupported("model_type").expected(SUPPORTED).found(shorten(&self.model_type)));
        }
        let known = ["FalconMambaForCausalLM", "MambaForCausalLM"];
        if let Some(other) = self.architectures.iter().find(|a| !known.contains(&a.as_str())) {
            return Err(unsupported("architectures").expected(SUPPORTED).found(shorten(other)));
        }
        for (name, wanted, why) in [
            ("use_bias", false, "biases of in_proj and out_proj have no place in GGUF's mamba"),
            ("use_conv_bias", true, "every GGUF reader requires the convolution's bias"),
        ] {
            if flag(&self.fields, name)?.is_some_and(|value| value != wanted) {
                return Err(unsupported(name).expected(wanted).found(!wanted).hint(why));
            }
        }
        match self.fields.get("hidden_act") {
            None => Ok(()),
            Some(Value::String(act)) if act == "silu" => Ok(()),
            Some(other) => Err(unsupported("hidden_act").expected("\"silu\"").found(describe(other))),
        }
    }

    /// Layers, if config.json says it well; else as many as a model may have, since [`Self::hyperparams`] will tell.
    pub(super) fn n_layer_at_most(&self) -> usize {
        self.required(&["num_hidden_layers", "n_layer"], LAYERS_MAX).unwrap_or(LAYERS_MAX as usize)
    }

    /// The hyperparameters, with what was noteworthy about them. `has_lm_head` tells whether the files hold
    /// lm_head.weight, `d_inner_of_files` what width the first layer's A_log has, if there is one.
    pub(super) fn hyperparams(
        &self,
        has_lm_head: bool,
        d_inner_of_files: Option<u64>,
    ) -> Result<(HyperParams, Vec<String>)> {
        self.hyperparams_of(has_lm_head, d_inner_of_files).map_err(|e| e.file(&self.path))
    }

    fn hyperparams_of(&self, has_lm_head: bool, d_inner: Option<u64>) -> Result<(HyperParams, Vec<String>)> {
        let mut warnings = Vec::new();
        let d_model = self.required(&["hidden_size", "d_model"], WIDTH_MAX)?;
        let vocab_size = self.required(&["vocab_size"], VOCAB_MAX)?;
        let arch = self.arch(vocab_size, has_lm_head, &mut warnings)?;
        let h = HyperParams {
            arch,
            d_model,
            d_inner: self.d_inner(arch, d_model, d_inner)?,
            d_state: self.size(&["state_size", "d_state"], D_STATE_MAX)?.unwrap_or(16),
            d_conv: self.size(&["conv_kernel", "d_conv"], D_CONV_MAX)?.unwrap_or(4),
            dt_rank: self.dt_rank(d_model)?,
            n_layer: self.required(&["num_hidden_layers", "n_layer"], LAYERS_MAX)?,
            vocab_size,
            layer_norm_epsilon: self.epsilon(&["layer_norm_epsilon", "rms_norm_eps"])?.unwrap_or(1e-5),
            mixer_rms_eps: match (arch, self.epsilon(&["mixer_rms_eps"])?) {
                (_, Some(eps)) => eps,
                (Arch::Mamba, None) => 1e-6,
                (Arch::FalconMamba, None) => {
                    warnings.push(
                        "config.json has no mixer_rms_eps: taking transformers' default 1e-6".to_owned(),
                    );
                    1e-6
                }
            },
        };
        Ok((h, warnings))
    }

    /// Which family it is. `model_type: mamba` is plain Mamba, except that TII first published Falcon Mamba under
    /// it (an early revision of falcon-mamba-7b-instruct and the first -instruct-4bit): run as plain Mamba, those
    /// weights give gibberish. Such a config is recognised by any of
    /// - a `mixer_rms_eps`, which `MambaConfig` does not have;
    /// - architectures or `_name_or_path` that speak of Falcon;
    /// - Falcon's vocabulary size together with an output matrix of its own: every published plain Mamba has
    ///   another vocabulary and is tied.
    fn arch(&self, vocab_size: usize, has_lm_head: bool, warnings: &mut Vec<String>) -> Result<Arch> {
        if self.model_type == "falcon_mamba" {
            return Ok(Arch::FalconMamba);
        }
        let says_falcon = |text: &String| text.to_ascii_lowercase().contains("falcon");
        let evidence = if self.fields.contains_key("mixer_rms_eps") {
            "it has mixer_rms_eps"
        } else if self.architectures.iter().any(says_falcon) {
            "architectures names FalconMamba"
        } else if self.name.iter().any(says_falcon) {
            "_name_or_path names a Falcon"
        } else if vocab_size == FALCON_VOCAB && has_lm_head {
            "it has Falcon's vocabulary of 65024 and an output matrix of its own"
        } else {
            return Ok(Arch::Mamba);
        };
        warnings.push(format!(
            "model_type is \"mamba\" but this is a Falcon Mamba ({evidence}): its norms are applied"
        ));
        Ok(Arch::FalconMamba)
    }

    /// `intermediate_size`. `expand` is wrong in the published Falcon configs (16 instead of 2) and is only looked
    /// at for a plain Mamba without intermediate_size, where it must agree with the files.
    fn d_inner(&self, arch: Arch, d_model: usize, of_files: Option<u64>) -> Result<usize> {
        let names = &["intermediate_size", "d_inner"];
        let d_inner = match (self.size(names, WIDTH_MAX)?, arch) {
            (Some(d_inner), _) => d_inner,
            (None, Arch::FalconMamba) => return Err(missing(names)),
            (None, Arch::Mamba) => {
                let expand = self.size(&["expand"], 64)?.unwrap_or(2);
                let d_inner = expand.saturating_mul(d_model);
                if of_files.is_some_and(|n| n != d_inner as u64) {
                    return Err(missing(names).hint("expand x hidden_size disagrees with the tensors"));
                }
                d_inner
            }
        };
        if d_inner != 2 * d_model {
            return Err(Error::new(ErrorKind::Unsupported)
                .what("intermediate_size")
                .expected(format!("2 x hidden_size = {}, all that GGUF readers load", 2 * d_model))
                .found(d_inner));
        }
        Ok(d_inner)
    }

    fn dt_rank(&self, d_model: usize) -> Result<usize> {
        match self.first(&["time_step_rank", "dt_rank"]) {
            None => Ok(d_model.div_ceil(16)),
            Some((_, Value::String(auto))) if auto == "auto" => Ok(d_model.div_ceil(16)),
            Some((name, value)) => size_of(name, value, WIDTH_MAX),
        }
    }

    /// The first of several names that is there and not null.
    fn first(&self, names: &[&'static str]) -> Option<(&'static str, &Value)> {
        names.iter().find_map(|name| Some((*name, self.fields.get(*name).filter(|v| !v.is_null())?)))
    }

    fn size(&self, names: &[&'static str], max: u64) -> Result<Option<usize>> {
        self.first(names).map(|(name, value)| size_of(name, value, max)).transpose()
    }

    fn required(&self, names: &[&'static str], max: u64) -> Result<usize> {
        self.size(names, max)?.ok_or_else(|| missing(names))
    }

    fn epsilon(&self, names: &[&'static str]) -> Result<Option<f32>> {
        let Some((name, value)) = self.first(names) else { return Ok(None) };
        let error =
            |kind| Error::new(kind).what(name).expected("a number above 0, at most 1").found(describe(value));
        let eps = value.as_f64().ok_or_else(|| error(ErrorKind::WrongType))? as f32;
        if eps > 0.0 && eps <= 1.0 { Ok(Some(eps)) } else { Err(error(ErrorKind::OutOfRange)) }
    }
}

fn missing(names: &[&str]) -> Error {
    Error::new(ErrorKind::Missing).what(names.join(" or ")).expected("a size")
}

fn size_of(name: &str, value: &Value, max: u64) -> Result<usize> {
    let error = |kind| {
        Error::new(kind).what(name).expected(format!("a whole number from 1 to {max}")).found(describe(value))
    };
    match value.as_u64() {
        Some(x) if (1..=max).contains(&x) => usize::try_from(x).map_err(|_| error(ErrorKind::OutOfRange)),
        Some(_) => Err(error(ErrorKind::OutOfRange)),
        None if value.as_i64().is_some() => Err(error(ErrorKind::OutOfRange)),
        None => Err(error(ErrorKind::WrongType)),
    }
}

pub(super) fn flag(fields: &Map<String, Value>, name: &str) -> Result<Option<bool>> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(x)) => Ok(Some(*x)),
        Some(other) => {
            Err(Error::new(ErrorKind::WrongType).what(name).expected("true or false").found(describe(other)))
        }
    }
}
