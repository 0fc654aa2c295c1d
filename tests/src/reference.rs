//! The forward pass of Mamba and Falcon Mamba, written to be read: one token at a time, straight loops, no kernels.
//!
//! This is the truth that everything faster is tested against, and it is itself tested against transformers
//! (`tests/reference.rs`). Weights are f32 as a file holds them; all arithmetic is f64, so that its own rounding is far
//! below any tolerance. It follows Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
//! (arXiv 2312.00752), Algorithm 2, and for the three extra norms TII's "Falcon Mamba" (arXiv 2410.05355).
//!
//! Shapes are in the comments, in PyTorch's order (rows, cols): d_model, d_inner, d_state, d_conv, dt_rank as in
//! [`kestrel_formats::arch`].

use kestrel_formats::arch::{Arch, HyperParams};
use std::collections::HashMap;

/// GGUF name -> (shape, weights).
pub type Tensors = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// A model whose weights are in memory as f32.
pub struct Reference {
    /// `mixer_rms_eps` is the one that belongs to these weights: the config's for x_proj as published,
    /// `layer_norm_epsilon` for x_proj as GGUF files of ours hold it.
    pub h: HyperParams,
    /// As in a GGUF file: A, not A_log.
    pub tensors: Tensors,
}

/// What the model remembers of the tokens so far.
#[derive(Clone)]
pub struct State {
    layers: Vec<LayerState>,
}

#[derive(Clone)]
struct LayerState {
    /// The last d_conv - 1 inputs of the convolution, oldest first: [d_conv - 1, d_inner].
    conv: Vec<Vec<f64>>,
    /// h of the recurrence: [d_inner, d_state].
    ssm: Vec<Vec<f64>>,
}

impl Reference {
    /// The state before the first token: all zero.
    pub fn new_state(&self) -> State {
        let h = &self.h;
        let layer = LayerState {
            conv: vec![vec![0.0; h.d_inner]; h.d_conv - 1],
            ssm: vec![vec![0.0; h.d_state]; h.d_inner],
        };
        State { layers: vec![layer; h.n_layer] }
    }

    /// Logits after every token of a prompt, from an empty state: n_tokens rows of `vocab_size`.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let mut state = self.new_state();
        tokens.iter().map(|&token| self.step(&mut state, token)).collect()
    }

    /// One token in, the logits for the next one out: (vocab_size).
    pub fn step(&self, state: &mut State, token: u32) -> Vec<f64> {
        let h = &self.h;
        let embedding = self.tensor("token_embd.weight"); // [vocab_size, d_model]
        let row = token as usize * h.d_model;
        let mut residual: Vec<f64> = embedding[row..row + h.d_model].iter().map(|&w| f64::from(w)).collect(); // [d_model]

        for (layer, state) in state.layers.iter_mut().enumerate() {
            let normed = self.rms_norm(&residual, &format!("blk.{layer}.attn_norm.weight")); // [d_model]
            let mixed = self.mixer(layer, state, &normed); // [d_model]
            for (r, m) in residual.iter_mut().zip(mixed) {
                *r += m;
            }
        }

        let last = self.rms_norm(&residual, "output_norm.weight"); // [d_model]
        let head =
            if self.tensors.contains_key("output.weight") { "output.weight" } else { "token_embd.weight" };
        self.matvec(head, &last) // [vocab_size, d_model] · [d_model]
    }

    /// The selective state space block of one layer: [d_model] -> [d_model].
    fn mixer(&self, layer: usize, state: &mut LayerState, input: &[f64]) -> Vec<f64> {
        let h = &self.h;
        let name = |suffix: &str| format!("blk.{layer}.{suffix}");

        // Input projection: x goes through the recurrence, z gates its output.
        let xz = self.matvec(&name("ssm_in.weight"), input); // [2·d_inner, d_model] · [d_model]
        let (x, z) = xz.split_at(h.d_inner); // [d_inner] each

        let u = self.causal_conv(layer, state, x); // [d_inner]

        // What makes it selective: step size, input and output matrices depend on the input.
        let dbc = self.matvec(&name("ssm_x.weight"), &u); // [dt_rank + 2·d_state, d_inner] · [d_inner]
        let mut dt = dbc[..h.dt_rank].to_vec(); // [dt_rank]
        let mut b = dbc[h.dt_rank..h.dt_rank + h.d_state].to_vec(); // [d_state]
        let mut c = dbc[h.dt_rank + h.d_state..].to_vec(); // [d_state]
        if h.arch == Arch::FalconMamba {
            for part in [&mut dt, &mut b, &mut c] {
                *part = normalized(part, h.mixer_rms_eps); // no weights
            }
        }
        let dt_bias = self.tensor(&name("ssm_dt.bias")); // [d_inner]
        let delta: Vec<f64> = self
            .matvec(&name("ssm_dt.weight"), &dt) // [d_inner, dt_rank] · [dt_rank]
            .iter()
            .zip(dt_bias)
            .map(|(v, &bias)| softplus(v + f64::from(bias)))
            .collect(); // [d_inner]

        // Recurrence, discretized with the zero-order hold for A and Euler's rule for B:
        // h_t = exp(Δ·A)·h_(t-1) + Δ·B·u and y = C·h_t + D·u.
        let a = self.tensor(&name("ssm_a")); // [d_inner, d_state], negative
        let d = self.tensor(&name("ssm_d")); // [d_inner]
        let mut gated = vec![0.0; h.d_inner]; // [d_inner]
        for i in 0..h.d_inner {
            let mut y = f64::from(d[i]) * u[i];
            for n in 0..h.d_state {
                let decay = (delta[i] * f64::from(a[i * h.d_state + n])).exp();
                state.ssm[i][n] = decay * state.ssm[i][n] + delta[i] * b[n] * u[i];
                y += c[n] * state.ssm[i][n];
            }
            gated[i] = y * silu(z[i]);
        }

        self.matvec(&name("ssm_out.weight"), &gated) // [d_model, d_inner] · [d_inner]
    }

    /// Each channel's own filter over its last d_conv inputs, then SiLU: [d_inner] -> [d_inner].
    fn causal_conv(&self, layer: usize, state: &mut LayerState, x: &[f64]) -> Vec<f64> {
        let h = &self.h;
        let weight = self.tensor(&format!("blk.{layer}.ssm_conv1d.weight")); // [d_inner, d_conv], newest tap last
        let bias = self.tensor(&format!("blk.{layer}.ssm_conv1d.bias")); // [d_inner]
        state.conv.push(x.to_vec()); // now [d_conv, d_inner]
        let out = (0..h.d_inner)
            .map(|i| {
                let taps: f64 =
                    (0..h.d_conv).map(|k| f64::from(weight[i * h.d_conv + k]) * state.conv[k][i]).sum();
                silu(taps + f64::from(bias[i]))
            })
            .collect();
        state.conv.remove(0);
        out
    }

    /// RMS norm with a weight: [n] -> [n].
    fn rms_norm(&self, x: &[f64], weight: &str) -> Vec<f64> {
        let normed = normalized(x, self.h.layer_norm_epsilon);
        normed.iter().zip(self.tensor(weight)).map(|(v, &w)| v * f64::from(w)).collect()
    }

    /// [rows, cols] · [cols] -> [rows].
    fn matvec(&self, weight: &str, x: &[f64]) -> Vec<f64> {
        let rows = self.tensor(weight).chunks_exact(x.len());
        rows.map(|row| row.iter().zip(x).map(|(&w, v)| f64::from(w) * v).sum()).collect()
    }

    fn tensor(&self, name: &str) -> &[f32] {
        &self.tensors.get(name).unwrap_or_else(|| panic!("the model has no tensor {name}")).1
    }
}

/// x / sqrt(mean(x²) + eps).
fn normalized(x: &[f64], eps: f32) -> Vec<f64> {
    let mean_square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean_square + f64::from(eps)).sqrt();
    x.iter().map(|v| v * scale).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    // The same function as ln(1 + e^x) without overflow for large x or cancellation for small.
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
