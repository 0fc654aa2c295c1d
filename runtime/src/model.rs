//! A model: hyperparameters and weights, borrowed from the mapped file wherever they can be.

use crate::kernels::ByChannel;
use crate::matrix::{Floats, Matrix};
use crate::state::{State, StateShape, checksum};
use kestrel_formats::arch::{HyperParams, Role};
use kestrel_formats::map::Map;
use kestrel_formats::tokenizer::TokenizerData;
use kestrel_formats::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

/// Where a model's tensors come from: a GGUF file or a checkpoint folder.
pub(crate) trait WeightSource {
    /// The matrix of `role` in `layer`, in place or quantized as the user asked.
    fn matrix(&self, role: Role, layer: usize) -> Result<Matrix>;

    /// The small f32 tensor of `role` in `layer`.
    fn floats(&self, role: Role, layer: usize) -> Result<Floats>;
}

/// One layer's weights; names as in GGUF.
#[allow(missing_docs)] // the shapes say it
pub struct Layer {
    pub attn_norm: Floats,      // (d_model)
    pub ssm_in: Matrix,         // (2·d_inner, d_model): x rows, then z rows
    pub conv_weight: ByChannel, // (d_inner, d_conv)
    pub conv_bias: Floats,      // (d_inner)
    pub ssm_x: Matrix,          // (dt_rank + 2·d_state, d_inner): dt, B, C
    pub ssm_dt: Matrix,         // (d_inner, dt_rank)
    pub dt_bias: Floats,        // (d_inner)
    pub a: ByChannel,           // (d_inner, d_state), negative
    pub d: Floats,              // (d_inner)
    pub ssm_out: Matrix,        // (d_model, d_inner)
}

/// A loaded model. Immutable; any number of sessions may share it.
pub struct Model {
    path: PathBuf,
    hparams: HyperParams,
    pub(crate) token_embd: Matrix, // (vocab, d_model)
    pub(crate) layers: Vec<Layer>,
    pub(crate) output_norm: Floats,    // (d_model)
    pub(crate) output: Option<Matrix>, // (vocab, d_model); tied to token_embd if absent
    tokenizer: Option<TokenizerData>,
    warnings: Vec<String>,
    /// Each file that weights are executed from.
    maps: Vec<Map>,
    fingerprint: u64,
}

impl Model {
    pub(crate) fn build(
        path: &Path,
        hparams: HyperParams,
        tied: bool,
        source: &dyn WeightSource,
    ) -> Result<Self> {
        let layers =
            (0..hparams.n_layer).map(|i| Layer::load(source, &hparams, i)).collect::<Result<Vec<_>>>()?;
        let output_norm = source.floats(Role::OutputNorm, 0)?;
        let fingerprint = fingerprint(&output_norm, &layers);
        let mut model = Self {
            path: path.to_owned(),
            token_embd: source.matrix(Role::TokenEmbd, 0)?,
            output: (!tied).then(|| source.matrix(Role::Output, 0)).transpose()?,
            hparams,
            layers,
            output_norm,
            tokenizer: None,
            warnings: Vec::new(),
            maps: Vec::new(),
            fingerprint,
        };
        let mut maps: Vec<Map> = Vec::new();
        for map in model.matrices().filter_map(|(_, m)| m.map()) {
            if !maps.iter().any(|known| known.is(map)) {
                maps.push(map.clone());
            }
        }
        model.maps = maps;
        Ok(model)
    }

    /// `Changed` if a file that weights are executed from was written to since it was opened. Costs a system call per
    /// file.
    pub fn check_unmodified(&self) -> Result<()> {
        self.maps.iter().try_for_each(Map::check_unmodified)
    }

    /// As [`Self::check_unmodified`], and `Changed` if another file has taken the place of one.
    pub fn check_unchanged(&self) -> Result<()> {
        self.maps.iter().try_for_each(Map::check_unchanged)
    }

    /// The file or folder that the model came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Shapes and constants.
    pub fn hparams(&self) -> &HyperParams {
        &self.hparams
    }

    /// The vocabulary as read, if there is one.
    pub fn tokenizer_data(&self) -> Option<&TokenizerData> {
        self.tokenizer.as_ref()
    }

    /// What is odd about the file or folder and yet no reason to refuse it.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// With what a file says beside weights.
    pub(crate) fn with(self, tokenizer: Option<TokenizerData>, warnings: Vec<String>) -> Self {
        Self { tokenizer, warnings, ..self }
    }

    /// A number that two models share if they come from the same weights, quantized or not.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// An empty state for one sequence.
    pub fn new_state(&self) -> State {
        State::new(self.state_shape())
    }

    /// The shape that a state of this model has.
    pub fn state_shape(&self) -> StateShape {
        StateShape::new(&self.hparams, self.fingerprint)
    }

    /// Whether `state` can go on with this model. Errors: it belongs to another one.
    pub(crate) fn check_state(&self, state: &State) -> Result<()> {
        if *state.shape() != self.state_shape() {
            return Err(Error::new(ErrorKind::Inconsistent).what("state").expected("a state of this model"));
        }
        Ok(())
    }

    /// Whether the embedding is the output matrix as well.
    pub fn is_tied(&self) -> bool {
        self.output.is_none()
    }

    /// The matrix that gives the logits (vocab, d_model).
    pub(crate) fn output_matrix(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.token_embd)
    }

    /// Every matrix with its role, for reports.
    pub fn matrices(&self) -> impl Iterator<Item = (Role, &Matrix)> {
        let outer = [(Role::TokenEmbd, Some(&self.token_embd)), (Role::Output, self.output.as_ref())];
        let layers = self.layers.iter().flat_map(|l| {
            [
                (Role::SsmIn, &l.ssm_in),
                (Role::SsmX, &l.ssm_x),
                (Role::SsmDt, &l.ssm_dt),
                (Role::SsmOut, &l.ssm_out),
            ]
        });
        outer.into_iter().filter_map(|(r, m)| m.map(|m| (r, m))).chain(layers)
    }
}

impl Layer {
    fn load(source: &dyn WeightSource, h: &HyperParams, i: usize) -> Result<Self> {
        Ok(Self {
            attn_norm: source.floats(Role::AttnNorm, i)?,
            ssm_in: source.matrix(Role::SsmIn, i)?,
            conv_weight: ByChannel::new(&source.floats(Role::SsmConv1d, i)?, h.d_conv),
            conv_bias: source.floats(Role::SsmConv1dBias, i)?,
            ssm_x: source.matrix(Role::SsmX, i)?,
            ssm_dt: source.matrix(Role::SsmDt, i)?,
            dt_bias: source.floats(Role::SsmDtBias, i)?,
            a: ByChannel::new(&source.floats(Role::SsmA, i)?, h.d_state),
            d: source.floats(Role::SsmD, i)?,
            ssm_out: source.matrix(Role::SsmOut, i)?,
        })
    }

    /// The small tensors.
    pub(crate) fn floats(&self) -> [&[f32]; 6] {
        [
            &self.attn_norm,
            self.conv_weight.numbers(),
            &self.conv_bias,
            &self.dt_bias,
            self.a.numbers(),
            &self.d,
        ]
    }
}

/// From tensors that no quantization changes: the final norm, and each layer's norm and step bias.
fn fingerprint(output_norm: &[f32], layers: &[Layer]) -> u64 {
    let tensors = layers.iter().flat_map(|l| [&*l.attn_norm, &*l.dt_bias]).chain([output_norm]);
    let bytes: Vec<u8> = tensors.flatten().flat_map(|x| x.to_le_bytes()).collect();
    checksum(&bytes)
}
