//! The architectures: hyperparameters, and one table of tensors that the converter and the runtime both read.
//!
//! Adding an architecture is a table here and a forward pass in `runtime`.
//!
//! | name | meaning | falcon-mamba-7b |
//! |---|---|---|
//! | `d_model` | width of the residual stream | 4096 |
//! | `d_inner` | channels of the mixer | 8192 |
//! | `d_state` | state numbers per channel | 16 |
//! | `d_conv` | taps of the causal convolution | 4 |
//! | `dt_rank` | rank of the step-size projection | 256 |
//! | `n_layer` | layers | 64 |

/// Which model family a set of weights belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// Mamba-1 as published by state-spaces.
    Mamba,
    /// Mamba-1 with a weightless RMS norm on dt, B and C (TII).
    FalconMamba,
}

/// The numbers that fix every shape and constant of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)] // the glossary above
pub struct HyperParams {
    pub arch: Arch,
    pub d_model: usize,
    pub d_inner: usize,
    pub d_state: usize,
    pub d_conv: usize,
    pub dt_rank: usize,
    pub n_layer: usize,
    pub vocab_size: usize,
    /// eps of the layer norms and the final norm.
    pub layer_norm_epsilon: f32,
    /// eps of the RMS norm on dt, B and C as these weights need it; unused by [`Arch::Mamba`].
    pub mixer_rms_eps: f32,
}

impl HyperParams {
    /// Rows of x_proj: dt, B and C stacked in this order.
    pub fn x_proj_rows(&self) -> usize {
        self.dt_rank + 2 * self.d_state
    }

    /// The factor on `ssm_x.weight` after which an RMS norm with `layer_norm_epsilon` equals one with
    /// `mixer_rms_eps` before: s·x / sqrt(s²·m + e1) = x / sqrt(m + e1/s²), and e1/s² = e2 for s = sqrt(e1/e2).
    pub fn x_proj_scale(&self) -> f32 {
        match self.arch {
            Arch::Mamba => 1.0,
            Arch::FalconMamba => {
                (f64::from(self.layer_norm_epsilon) / f64::from(self.mixer_rms_eps)).sqrt() as f32
            }
        }
    }
}

/// What a tensor is in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Role {
    TokenEmbd,
    OutputNorm,
    Output,
    AttnNorm,
    SsmIn,
    SsmConv1d,
    SsmConv1dBias,
    SsmX,
    SsmDt,
    SsmDtBias,
    SsmA,
    SsmD,
    SsmOut,
}

/// How a tensor may be stored in a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Any type: the recipe decides.
    Quantizable,
    /// Always F32.
    F32,
}

/// What happens to the numbers between checkpoint and GGUF. The arithmetic itself is in `kestrel_quant::transform`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transform {
    /// Copied.
    None,
    /// `-exp(x)`, for A_log.
    NegExp,
    /// Times [`HyperParams::x_proj_scale`].
    RmsEpsScale,
}

/// One row of the tensor table.
#[derive(Clone, Copy, Debug)]
pub struct TensorSpec {
    /// What the tensor is.
    pub role: Role,
    /// Name in GGUF; `{}` is the layer.
    pub gguf: &'static str,
    /// Name in a Hugging Face checkpoint; `{}` is the layer.
    pub hf: &'static str,
    /// Shape in GGUF, PyTorch order (rows, cols).
    pub shape: fn(&HyperParams) -> Vec<usize>,
    /// Shape in a checkpoint where it differs (the convolution's middle 1); same element order.
    pub hf_shape: fn(&HyperParams) -> Vec<usize>,
    /// Stored as the recipe says, or F32.
    pub storage: Storage,
    /// Arithmetic on the way into GGUF.
    pub transform: Transform,
}

impl TensorSpec {
    /// Whether each layer has one.
    pub fn per_layer(&self) -> bool {
        self.gguf.contains("{}")
    }

    /// GGUF name in `layer` (ignored for tensors outside the layers).
    pub fn gguf_name(&self, layer: usize) -> String {
        self.gguf.replace("{}", &layer.to_string())
    }

    /// Checkpoint name in `layer`.
    pub fn hf_name(&self, layer: usize) -> String {
        self.hf.replace("{}", &layer.to_string())
    }
}

macro_rules! spec {
    ($role:ident, $gguf:literal, $hf:literal, $shape:expr, $storage:ident, $transform:ident) => {
        spec!($role, $gguf, $hf, $shape, $shape, $storage, $transform)
    };
    ($role:ident, $gguf:literal, $hf:literal, $shape:expr, $hf_shape:expr, $storage:ident, $transform:ident) => {
        TensorSpec {
            role: Role::$role,
            gguf: $gguf,
            hf: $hf,
            shape: $shape,
            hf_shape: $hf_shape,
            storage: Storage::$storage,
            transform: Transform::$transform,
        }
    };
}

/// Every tensor of Mamba-1 and Falcon Mamba, in the order in which GGUF files hold them.
#[rustfmt::skip]
pub static TENSORS: [TensorSpec; 13] = [
    spec!(TokenEmbd,     "token_embd.weight",        "backbone.embeddings.weight",               |h| vec![h.vocab_size, h.d_model],  Quantizable, None),
    spec!(AttnNorm,      "blk.{}.attn_norm.weight",  "backbone.layers.{}.norm.weight",           |h| vec![h.d_model],                F32,         None),
    spec!(SsmIn,         "blk.{}.ssm_in.weight",     "backbone.layers.{}.mixer.in_proj.weight",  |h| vec![2 * h.d_inner, h.d_model], Quantizable, None),
    spec!(SsmConv1d,     "blk.{}.ssm_conv1d.weight", "backbone.layers.{}.mixer.conv1d.weight",   |h| vec![h.d_inner, h.d_conv],
                                                                                                 |h| vec![h.d_inner, 1, h.d_conv],   F32,         None),
    spec!(SsmConv1dBias, "blk.{}.ssm_conv1d.bias",   "backbone.layers.{}.mixer.conv1d.bias",     |h| vec![h.d_inner],                F32,         None),
    spec!(SsmX,          "blk.{}.ssm_x.weight",      "backbone.layers.{}.mixer.x_proj.weight",   |h| vec![h.x_proj_rows(), h.d_inner], Quantizable, RmsEpsScale),
    spec!(SsmDt,         "blk.{}.ssm_dt.weight",     "backbone.layers.{}.mixer.dt_proj.weight",  |h| vec![h.d_inner, h.dt_rank],     Quantizable, None),
    spec!(SsmDtBias,     "blk.{}.ssm_dt.bias",       "backbone.layers.{}.mixer.dt_proj.bias",    |h| vec![h.d_inner],                F32,         None),
    spec!(SsmA,          "blk.{}.ssm_a",             "backbone.layers.{}.mixer.A_log",           |h| vec![h.d_inner, h.d_state],     F32,         NegExp),
    spec!(SsmD,          "blk.{}.ssm_d",             "backbone.layers.{}.mixer.D",               |h| vec![h.d_inner],                F32,         None),
    spec!(SsmOut,        "blk.{}.ssm_out.weight",    "backbone.layers.{}.mixer.out_proj.weight", |h| vec![h.d_model, h.d_inner],     Quantizable, None),
    spec!(OutputNorm,    "output_norm.weight",       "backbone.norm_f.weight",                   |h| vec![h.d_model],                F32,         None),
    spec!(Output,        "output.weight",            "lm_head.weight",                           |h| vec![h.vocab_size, h.d_model],  Quantizable, None),
];

/// The row for a role.
pub fn spec(role: Role) -> &'static TensorSpec {
    &TENSORS[TENSORS.iter().position(|t| t.role == role).expect("every role has a row")]
}

/// Whether a checkpoint of `n_layer` layers can have a tensor of this name.
pub fn is_hf_name(name: &str, n_layer: usize) -> bool {
    TENSORS.iter().any(|t| match t.hf.split_once("{}") {
        None => t.hf == name,
        Some((before, after)) => {
            let layer = name.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
            layer.is_some_and(|text| {
                let plain = text == "0" || !text.starts_with(['0', '+']);
                plain && text.parse().is_ok_and(|layer: usize| layer < n_layer)
            })
        }
    })
}

/// Every (row, layer) of a model in file order. `tied` leaves out the output matrix, which is then the embedding.
pub fn tensors(h: &HyperParams, tied: bool) -> Vec<(&'static TensorSpec, usize)> {
    let outer =
        |first: bool| TENSORS.iter().filter(move |t| !t.per_layer() && (t.role == Role::TokenEmbd) == first);
    let mut out: Vec<_> = outer(true).map(|t| (t, 0)).collect();
    for layer in 0..h.n_layer {
        out.extend(TENSORS.iter().filter(|t| t.per_layer()).map(|t| (t, layer)));
    }
    out.extend(outer(false).filter(|t| !(tied && t.role == Role::Output)).map(|t| (t, 0)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shape of the 7B, from its config.json.
    const FALCON_7B: HyperParams = HyperParams {
        arch: Arch::FalconMamba,
        d_model: 4096,
        d_inner: 8192,
        d_state: 16,
        d_conv: 4,
        dt_rank: 256,
        n_layer: 64,
        vocab_size: 65024,
        layer_norm_epsilon: 1e-5,
        mixer_rms_eps: 1e-6,
    };

    #[test]
    fn the_7b_has_643_tensors_and_7_272_665_088_parameters() {
        let all = tensors(&FALCON_7B, false);
        assert_eq!(all.len(), 643);
        let n: usize = all.iter().map(|(t, _)| (t.shape)(&FALCON_7B).iter().product::<usize>()).sum();
        assert_eq!(n, 7_272_665_088);
    }

    #[test]
    fn names_of_a_model_are_known_and_no_others() {
        for (t, layer) in tensors(&FALCON_7B, false) {
            assert!(is_hf_name(&t.hf_name(layer), 64), "{}", t.hf_name(layer));
        }
        for layer in ["64", "00", "01", "+1", "-1", "", "99999999999999999999"] {
            assert!(!is_hf_name(&format!("backbone.layers.{layer}.mixer.D"), 64), "{layer}");
        }
        assert!(!is_hf_name("backbone.layers.0.mixer.D.absmax", 64) && !is_hf_name("", 64));
    }

    #[test]
    fn the_eps_scale_is_sqrt_10_for_the_7b_and_1_for_falcon3() {
        assert!((FALCON_7B.x_proj_scale() - 10f32.sqrt()).abs() < 1e-6);
        assert_eq!(HyperParams { mixer_rms_eps: 1e-5, ..FALCON_7B }.x_proj_scale(), 1.0);
    }
}
