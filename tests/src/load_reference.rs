//! The reference model from a file, of either kind.

use crate::reference::{Reference, Tensors};
use kestrel_formats::arch::{self, Transform};
use kestrel_formats::checkpoint::Checkpoint;
use kestrel_formats::gguf::{Gguf, hyperparams_from_gguf};
use kestrel_quant::codec::codec;
use kestrel_quant::transform;

/// From a GGUF file, every tensor dequantized.
pub fn from_gguf(file: &Gguf) -> Reference {
    let (h, tied) = hyperparams_from_gguf(file).expect("a model");
    let mut tensors = Tensors::new();
    for (spec, layer) in arch::tensors(&h, tied) {
        let name = spec.gguf_name(layer);
        let view = file.tensor(&name).expect("a validated file has every tensor");
        let shape: Vec<usize> = view.info.shape.iter().map(|&d| d as usize).collect();
        let mut values = vec![0.0; shape.iter().product()];
        codec(view.info.dtype).dequantize(view.bytes, &mut values);
        tensors.insert(name, (shape, values));
    }
    Reference { h, tensors }
}

/// From a checkpoint folder. x_proj is left as published and goes with the config's own mixer_rms_eps, so that this
/// path knows nothing of the scaling that makes the two equal in a GGUF file.
pub fn from_checkpoint(checkpoint: &Checkpoint) -> Reference {
    let h = *checkpoint.hyperparams();
    let mut tensors = Tensors::new();
    for (spec, layer) in arch::tensors(&h, checkpoint.tied()) {
        let source =
            checkpoint.tensor(&spec.hf_name(layer)).expect("a validated checkpoint has every tensor");
        let shape = (spec.shape)(&h);
        let mut bytes = vec![0; source.n_bytes as usize];
        checkpoint.read(source, 0, &mut bytes).expect("reading the tensor");
        let mut values = vec![0.0; shape.iter().product()];
        transform::to_f32(source.dtype, &bytes, &mut values);
        if spec.transform == Transform::NegExp {
            transform::apply(spec.transform, &h, &mut values).expect("finite weights");
        }
        tensors.insert(spec.gguf_name(layer), (shape, values));
    }
    Reference { h, tensors }
}
