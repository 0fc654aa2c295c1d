//! What a GGUF file of architecture `mamba` says about its model, and the metadata that says it.
//!
//! Source of the keys: llama.cpp's converter and loader for `mamba`. Both plain Mamba and Falcon Mamba use that
//! architecture; `mamba.ssm.dt_b_c_rms` tells them apart.

use super::KEY_ARCHITECTURE;
use super::read::{Gguf, TensorInfo};
use super::value::Value;
use crate::arch::{self, Arch, HyperParams, Role, Storage};
use crate::limits::{D_CONV_MAX, D_STATE_MAX, LAYERS_MAX, VOCAB_MAX, WIDTH_MAX};
use crate::{Error, ErrorKind, GgmlType, Result};

/// Value of `general.architecture` in the files that are read and written.
pub const ARCHITECTURE: &str = "mamba";

const KEY_CONTEXT_LENGTH: &str = "mamba.context_length";
const KEY_D_MODEL: &str = "mamba.embedding_length";
const KEY_FEED_FORWARD: &str = "mamba.feed_forward_length";
const KEY_HEAD_COUNT: &str = "mamba.attention.head_count";
const KEY_N_LAYER: &str = "mamba.block_count";
const KEY_D_CONV: &str = "mamba.ssm.conv_kernel";
const KEY_D_INNER: &str = "mamba.ssm.inner_size";
const KEY_D_STATE: &str = "mamba.ssm.state_size";
const KEY_DT_RANK: &str = "mamba.ssm.time_step_rank";
const KEY_EPS: &str = "mamba.attention.layer_norm_rms_epsilon";
const KEY_DT_B_C_RMS: &str = "mamba.ssm.dt_b_c_rms";
const KEY_VOCAB_SIZE: &str = "mamba.vocab_size";

/// What llama.cpp's converter writes for a model whose context has no end.
const CONTEXT_LENGTH: u32 = 1 << 20;

/// A file's model, after every tensor that it needs was found with the right shape.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// The hyperparameters. The file's weights carry the eps scale of [`HyperParams::x_proj_scale`] already, so
    /// `mixer_rms_eps` equals `layer_norm_epsilon`.
    pub hparams: HyperParams,
    /// No output matrix: the embedding is used.
    pub tied: bool,
    /// What is odd and yet no reason to refuse the model.
    pub warnings: Vec<String>,
}

/// Reads the hyperparameters and checks every tensor of [`arch::tensors`] against them.
///
/// Errors: `Unsupported` for another architecture, `Missing`, `WrongType` and `OutOfRange` for metadata, `Missing`
/// (names the first three), `BadShape` and `WrongType` for tensors, `Inconsistent` for a vocabulary of another
/// size than the embedding.
pub fn model_of(file: &Gguf) -> Result<ModelFacts> {
    read_model(file).map_err(|e| e.file(file.path()))
}

/// [`model_of`] without the warnings: (hyperparameters, whether the output matrix is the embedding).
pub fn hyperparams_from_gguf(file: &Gguf) -> Result<(HyperParams, bool)> {
    model_of(file).map(|m| (m.hparams, m.tied))
}

/// The `mamba.*` metadata of a model, keys, types and order as llama.cpp's converter has them.
pub fn architecture_metadata(h: &HyperParams) -> Vec<(String, Value)> {
    // Every number below is at most WIDTH_MAX or VOCAB_MAX, far below 2^32.
    let u32_of = |x: usize| Value::U32(x as u32);
    let pairs = [
        (KEY_CONTEXT_LENGTH, CONTEXT_LENGTH.into()),
        (KEY_D_MODEL, u32_of(h.d_model)),
        (KEY_FEED_FORWARD, Value::U32(0)),
        (KEY_HEAD_COUNT, Value::U32(0)),
        (KEY_N_LAYER, u32_of(h.n_layer)),
        (KEY_D_CONV, u32_of(h.d_conv)),
        (KEY_D_INNER, u32_of(h.d_inner)),
        (KEY_D_STATE, u32_of(h.d_state)),
        (KEY_DT_RANK, u32_of(h.dt_rank)),
        (KEY_EPS, h.layer_norm_epsilon.into()),
        (KEY_DT_B_C_RMS, (h.arch == Arch::FalconMamba).into()),
        (KEY_VOCAB_SIZE, u32_of(h.vocab_size)),
    ];
    pairs.map(|(key, value)| (key.to_owned(), value)).into()
}

fn read_model(file: &Gguf) -> Result<ModelFacts> {
    check_architecture(file)?;
    let hparams = read_hparams(file)?;
    let tied = file.tensor(arch::spec(Role::Output).gguf).is_none();
    check_tensors(file, &hparams, tied)?;
    let mut warnings = Vec::new();
    check_others(file, &hparams, tied, &mut warnings)?;
    if file.metadata().u64(KEY_CONTEXT_LENGTH)? == Some(0) {
        warnings.push(format!("{KEY_CONTEXT_LENGTH} is 0"));
    }
    if hparams.arch == Arch::Mamba
        && file.metadata().str("tokenizer.ggml.pre").ok().flatten() == Some("falcon")
    {
        warnings.push(format!(
            "the tokenizer is Falcon's but {KEY_DT_B_C_RMS} is not set, so the model runs as plain Mamba"
        ));
    }
    Ok(ModelFacts { hparams, tied, warnings })
}

fn missing_key(key: &str) -> Error {
    Error::new(ErrorKind::Missing).what(format!("key \"{key}\""))
}

fn check_architecture(file: &Gguf) -> Result<()> {
    match file.metadata().str(KEY_ARCHITECTURE)? {
        Some(ARCHITECTURE) => Ok(()),
        Some(other) => Err(Error::new(ErrorKind::Unsupported)
            .what(format!("key \"{KEY_ARCHITECTURE}\""))
            .expected(format!("\"{ARCHITECTURE}\""))
            .found(format!("\"{}\"", other.chars().take(64).collect::<String>()))),
        None => Err(missing_key(KEY_ARCHITECTURE)),
    }
}

fn read_hparams(file: &Gguf) -> Result<HyperParams> {
    let metadata = file.metadata();
    let out_of_range = |key: &str, expected: String, found: String| {
        let e =
            Error::new(ErrorKind::OutOfRange).what(format!("key \"{key}\"")).expected(expected).found(found);
        metadata.field(key).map_or_else(|| e.clone(), |f| e.clone().at(f.offset()))
    };
    let size = |key: &str, least: u64, most: u64| {
        let x = metadata.u64(key)?.ok_or_else(|| missing_key(key))?;
        match (least..=most).contains(&x) {
            true => Ok(x as usize),
            false => Err(out_of_range(key, format!("{least} to {most}"), x.to_string())),
        }
    };
    let eps = metadata.f32(KEY_EPS)?.ok_or_else(|| missing_key(KEY_EPS))?;
    if !(eps > 0.0 && eps < 1.0) {
        return Err(out_of_range(KEY_EPS, "a number between 0 and 1".to_owned(), eps.to_string()));
    }
    let is_falcon = metadata.bool(KEY_DT_B_C_RMS)?.unwrap_or(false);
    Ok(HyperParams {
        arch: if is_falcon { Arch::FalconMamba } else { Arch::Mamba },
        d_model: size(KEY_D_MODEL, 1, WIDTH_MAX)?,
        d_inner: size(KEY_D_INNER, 1, WIDTH_MAX)?,
        d_state: size(KEY_D_STATE, 1, D_STATE_MAX)?,
        // One tap would be no convolution and leave no state.
        d_conv: size(KEY_D_CONV, 2, D_CONV_MAX)?,
        dt_rank: size(KEY_DT_RANK, 1, WIDTH_MAX)?,
        n_layer: size(KEY_N_LAYER, 1, LAYERS_MAX)?,
        vocab_size: vocab_size(file)?,
        layer_norm_epsilon: eps,
        mixer_rms_eps: eps,
    })
}

/// Rows of the embedding, with which the optional `mamba.vocab_size` has to agree.
fn vocab_size(file: &Gguf) -> Result<usize> {
    let name = arch::spec(Role::TokenEmbd).gguf;
    let info = file
        .tensor(name)
        .ok_or_else(|| Error::new(ErrorKind::Missing).what(format!("tensor \"{name}\"")))?
        .info;
    let rows =
        info.shape.first().copied().filter(|rows| (1..=VOCAB_MAX).contains(rows)).ok_or_else(|| {
            Error::new(ErrorKind::BadShape)
                .what(format!("tensor \"{name}\""))
                .expected(format!("1 to {VOCAB_MAX} rows"))
                .found(format!("shape {:?}", info.shape))
        })?;
    match file.metadata().u64(KEY_VOCAB_SIZE)? {
        Some(n) if n != rows => Err(Error::new(ErrorKind::Inconsistent)
            .what(format!("key \"{KEY_VOCAB_SIZE}\""))
            .expected(format!("{rows}, the rows of {name}"))
            .found(n)),
        _ => Ok(rows as usize),
    }
}

/// Every tensor of the architecture is there, with its shape, and F32 where it has to be.
fn check_tensors(file: &Gguf, h: &HyperParams, tied: bool) -> Result<()> {
    let mut missing = Vec::new();
    let mut n_missing = 0;
    for (spec, layer) in arch::tensors(h, tied) {
        let name = spec.gguf_name(layer);
        let Some(view) = file.tensor(&name) else {
            n_missing += 1;
            if missing.len() < 3 {
                missing.push(name);
            }
            continue;
        };
        let expected = (spec.shape)(h);
        if !view.info.shape.iter().copied().eq(expected.iter().map(|&d| d as u64)) {
            return Err(Error::new(ErrorKind::BadShape)
                .what(format!("tensor \"{name}\""))
                .expected(format!("shape {expected:?}"))
                .found(format!("{:?}", view.info.shape)));
        }
        if spec.storage == Storage::F32 && view.info.dtype != GgmlType::F32 {
            return Err(Error::new(ErrorKind::WrongType)
                .what(format!("tensor \"{name}\""))
                .expected(GgmlType::F32)
                .found(view.info.dtype));
        }
    }
    if n_missing == 0 {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Missing)
        .what(format!("{n_missing} tensors"))
        .expected(missing.join(", ") + if n_missing > 3 { ", ..." } else { "" }))
}

/// Tensors that no model of this architecture has are warned about; those of a layer that the model does not have
/// are refused.
fn check_others(file: &Gguf, h: &HyperParams, tied: bool, warnings: &mut Vec<String>) -> Result<()> {
    let mut n_extra = 0;
    let mut first = None;
    for t in file.tensors() {
        match layer_of(t) {
            Some(Ok(layer)) if layer < h.n_layer as u64 => {}
            Some(layer) => {
                return Err(Error::new(ErrorKind::OutOfRange)
                    .at(t.offset)
                    .what(format!("tensor \"{}\"", t.name))
                    .expected(format!("a layer from 0 to {}", h.n_layer - 1))
                    .found(layer.map_or_else(str::to_owned, |n| n.to_string())));
            }
            None => {}
        }
        if !is_known(t) {
            n_extra += 1;
            first.get_or_insert(&t.name);
        }
    }
    // Names in the table are unique, and `check_tensors` found them all.
    debug_assert!(file.tensors().len() - n_extra == arch::tensors(h, tied).len());
    if let Some(first) = first {
        warnings
            .push(format!("{n_extra} tensors that this architecture does not have, the first \"{first}\""));
    }
    Ok(())
}

/// The layer in `blk.N.`, or the text there if it is no number as it would be written.
fn layer_of(t: &TensorInfo) -> Option<std::result::Result<u64, &str>> {
    let (layer, _) = t.name.strip_prefix("blk.")?.split_once('.')?;
    Some(match layer.parse::<u64>() {
        Ok(n) if n.to_string() == layer => Ok(n),
        _ => Err(layer),
    })
}

fn is_known(t: &TensorInfo) -> bool {
    let in_layer = t.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map(|(_, rest)| rest);
    arch::TENSORS.iter().any(|spec| match (spec.gguf.strip_prefix("blk.{}."), in_layer) {
        (Some(expected), Some(found)) => expected == found,
        (None, None) => spec.gguf == t.name,
        _ => false,
    })
}
