//! What a token costs at least, counted from the loaded tensors: the floor that a measured speed is compared with.

use crate::model::{Layer, Model};
use kestrel_formats::arch::Role;

/// Arithmetic and memory traffic that no implementation avoids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Multiply-adds of the layers' matrices per token.
    pub layer_macs: u64,
    /// Multiply-adds of the output matrix, once per token whose logits are wanted.
    pub output_macs: u64,
    /// Bytes of all weights that a step reads: everything but the embeddings of other tokens.
    pub weight_bytes: u64,
    /// Bytes of a sequence's state, read and written.
    pub state_bytes: u64,
}

impl Work {
    /// Multiply-adds of reading `n` tokens, with the logits after the last.
    pub fn prefill_macs(&self, n: u64) -> u64 {
        n * self.layer_macs + self.output_macs
    }

    /// Bytes that one step moves which takes each of `n_sequences` a token further.
    pub fn step_bytes(&self, n_sequences: u64) -> u64 {
        self.weight_bytes + n_sequences * self.state_bytes
    }
}

impl Model {
    /// The work of this model.
    pub fn work(&self) -> Work {
        let output = self.output_matrix();
        let macs = |rows: usize, cols: usize| (rows * cols) as u64;
        let layers = self.matrices().filter(|(role, _)| !matches!(role, Role::TokenEmbd | Role::Output));
        let (layer_macs, layer_bytes) =
            layers.fold((0, 0), |(n, bytes), (_, m)| (n + macs(m.rows, m.cols), bytes + m.n_bytes() as u64));
        let floats = self.layers.iter().flat_map(Layer::floats).chain([&*self.output_norm]);
        let float_bytes: u64 = floats.map(|f| size_of_val::<[f32]>(f) as u64).sum();
        Work {
            layer_macs,
            output_macs: macs(output.rows, output.cols),
            weight_bytes: layer_bytes
                + float_bytes
                + output.n_bytes() as u64
                + self.token_embd.view().row_bytes() as u64,
            state_bytes: 2 * self.new_state().n_bytes() as u64,
        }
    }
}
