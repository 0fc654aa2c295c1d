//! What needs no file, no thread and no system call, small enough for Miri: `scripts/sanitizers.sh miri` interprets these
//! tests on this machine's architecture and on a big-endian one. They run natively as well.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

use kestrel_formats::GgmlType;
use kestrel_quant::codec;
use kestrel_runtime::State;
#[cfg(target_endian = "little")]
use kestrel_runtime::kernels::{ActKind, Acts, Compute, Isa, MatrixRef, Then};
use kestrel_runtime::state::StateShape;
use kestrel_tests::bad_input::{Files, SMALL, containers};
use kestrel_tests::checkpoint_builder::{CheckpointBuilder, safetensors};
use kestrel_tests::fuzz::{gguf_container, safetensors_header, state_file};

/// Bytes of the files that are read: an interpreter is slow.
const FILE_BYTES: usize = 2048;

#[test]
fn small_gguf_files() {
    let mut n = 0;
    for case in containers() {
        if let Files::Gguf(bytes) = &case.files
            && bytes.len() <= FILE_BYTES
        {
            gguf_container(bytes);
            n += 1;
        }
    }
    assert!(n > 80, "{n}");
}

#[test]
fn safetensors_headers() {
    let tensors = &CheckpointBuilder::new().tensors[..3];
    let sound = safetensors(tensors);
    safetensors_header(&sound);
    let step = if cfg!(miri) { 7 } else { 1 };
    for n in (0..sound.len()).step_by(step) {
        safetensors_header(&sound[..n]);
        let mut flipped = sound.clone();
        flipped[n] ^= 0x15;
        safetensors_header(&flipped);
    }
}

#[test]
fn saved_states() {
    let state = State::new(StateShape::new(&SMALL, 7)).to_bytes();
    state_file(&state);
    for n in [0, 8, 55, 56, state.len() - 1] {
        state_file(&state[..n]);
    }
}

/// Numbers that no rounding makes equal by accident.
fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1013) as f32 / 506.5 - 1.0).collect()
}

#[test]
fn every_codec_there_and_back() {
    for ty in GgmlType::all() {
        let x = numbers(256);
        let mut stored = vec![0; ty.bytes_for(256).expect("whole blocks") as usize];
        codec(ty).quantize(&x, None, &mut stored);
        let mut back = vec![0.0; 256];
        codec(ty).dequantize(&stored, &mut back);
        let error = x.iter().zip(&back).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(error < 0.5, "{ty}: {error}");
        // Any bits: numbers come out, whatever they are.
        let odd: Vec<u8> = (0..stored.len()).map(|i| (i * 37 + 200) as u8).collect();
        codec(ty).dequantize(&odd, &mut back);
    }
}

/// Weights are executed as they lie in the file, which is little-endian.
#[cfg(target_endian = "little")]
#[test]
fn plain_kernels() {
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::Q8_0, GgmlType::Q4K] {
        let (rows, cols) = (3, 256);
        let mut bytes = vec![0; ty.bytes_for((rows * cols) as u64).expect("whole blocks") as usize];
        codec(ty).quantize(&numbers(rows * cols), None, &mut bytes);
        let mut compute = Compute::new(Isa::Scalar, 1, 4);
        for tokens in [1, 4] {
            let mut acts = Acts::with_capacity(tokens, cols);
            let x = numbers(tokens * cols);
            compute.norm(&x, &vec![1.0; cols], 1e-5, ActKind::for_weights(ty, false), &mut acts);
            let mut out = vec![0.0; tokens * rows];
            let matrix = MatrixRef::new(ty, rows, cols, &bytes).expect("a matrix");
            compute.matmul(&matrix, &acts, &mut out, Then::Store);
            assert!(out.iter().all(|x| x.is_finite()), "{ty}");
        }
    }
}
