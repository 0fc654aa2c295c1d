//! The reference model from a file, of either kind.

use crate::reference::{Reference, Tensors};
use kestrel_formats::arch::{self, Transform};
use kestrel_formats::checkpoint::{Checkpoint, Place, SourceTensor};
use kestrel_formats::gguf::{Gguf, hyperparams_from_gguf};
use kestrel_quant::codec::scales::{Absmax, Scales};
use kestrel_quant::codec::{codec, dequantize};
use kestrel_quant::transform;

/// The weights of a tensor, whatever its type.
pub fn dequantized(checkpoint: &Checkpoint, t: &SourceTensor) -> Vec<f32> {
    let read = |place: &Place| {
        let mut bytes = vec![0; place.n_bytes as usize];
        checkpoint.read(place, 0, &mut bytes).expect("reading the tensor");
        bytes
    };
    let floats = |place: &Place| -> Vec<f32> {
        read(place).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let mut values = vec![0.0; t.shape.iter().product::<u64>() as usize];
    let codes = read(&t.place);
    let Some(state) = &t.state else {
        dequantize(t.dtype, &codes, 0, None, &mut values);
        return values;
    };
    let (bytes, absmax) = match &state.nested {
        None => (Vec::new(), floats(&state.absmax)),
        Some(nested) => (read(&state.absmax), floats(&nested.absmax)),
    };
    let absmax = match &state.nested {
        None => Absmax::F32(&absmax),
        Some(nested) => Absmax::Nested {
            codes: &bytes,
            absmax: &absmax,
            blocksize: nested.blocksize as usize,
            map: &nested.map,
            offset: nested.offset,
        },
    };
    let scales = Scales { blocksize: state.blocksize as usize, round_to: state.dtype, absmax };
    dequantize(t.dtype, &codes, 0, Some(&scales), &mut values);
    values
}

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
        let mut values = dequantized(checkpoint, source);
        if spec.transform == Transform::NegExp {
            transform::apply(spec.transform, &h, &mut values).expect("finite weights");
        }
        tensors.insert(spec.gguf_name(layer), (shape, values));
    }
    Reference { h, tensors }
}
