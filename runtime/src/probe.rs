//! What becomes of a model when one of its matrices is quantized.

use crate::forward::{Runner, RunnerOptions};
use crate::matrix::{Bytes, Matrix};
use crate::model::Model;
use crate::session::{all_finite, check_logits, check_tokens};
use kestrel_formats::arch::Role;
use kestrel_formats::{GgmlType, Result};
use kestrel_quant::codec::codec;
use kestrel_quant::feedback::Feedback;
use kestrel_quant::isa::Isa;
use rayon::prelude::*;
use std::ops::Range;

/// Rows quantized at a time: as few as feedback takes together, since x_proj has hardly more rows than a large machine has
/// threads.
const CHUNK_ROWS: usize = 16;
/// Rows that errors are measured on.
const SAMPLE_ROWS: usize = 256;

/// How the rows of a matrix are quantized: with error feedback, or each weight to the nearest.
#[derive(Clone, Copy)]
pub struct Quantizer<'a> {
    /// The inputs' products, if known.
    pub feedback: Option<&'a Feedback>,
}

impl Quantizer<'_> {
    fn quantize(&self, ty: GgmlType, rows: &[f32], dst: &mut [u8]) {
        match self.feedback {
            Some(feedback) if feedback.takes(ty) => feedback.quantize_with(Isa::best(), ty, rows, dst),
            _ => codec(ty).quantize(rows, None, dst),
        }
    }

    /// The matrix in another type, whose blocks divide its rows.
    pub fn requantized(&self, matrix: &Matrix, ty: GgmlType) -> Result<Matrix> {
        let cols = matrix.cols;
        let row_bytes = cols / ty.block_len() * ty.block_bytes();
        let mut bytes = vec![0; matrix.rows * row_bytes];
        bytes.par_chunks_mut(CHUNK_ROWS * row_bytes).enumerate().for_each(|(i, dst)| {
            let mut rows = vec![0.0; dst.len() / row_bytes * cols];
            matrix.view().expand_flat(i * CHUNK_ROWS * cols, &mut rows);
            self.quantize(ty, &rows, dst);
        });
        Matrix::new(ty, matrix.rows, cols, Bytes::Owned(bytes))
    }

    /// The squared error of the matrix's outputs in each of the types, summed over a sample of its rows; without feedback
    /// that of its weights.
    pub fn errors(&self, matrix: &Matrix, types: &[GgmlType]) -> Vec<f64> {
        let cols = matrix.cols;
        let step = matrix.rows.div_ceil(SAMPLE_ROWS).max(1);
        let sample: Vec<usize> = (0..matrix.rows).step_by(step).collect();
        let of_rows = |ty: GgmlType, rows: &[usize]| {
            let row_bytes = cols / ty.block_len() * ty.block_bytes();
            let (mut from, mut bytes) = (vec![0.0; rows.len() * cols], vec![0; rows.len() * row_bytes]);
            for (row, to) in rows.iter().zip(from.chunks_mut(cols)) {
                matrix.view().expand_flat(row * cols, to);
            }
            self.quantize(ty, &from, &mut bytes);
            let mut errors = vec![0.0; from.len()];
            codec(ty).dequantize(&bytes, &mut errors);
            errors.iter_mut().zip(&from).for_each(|(e, w)| *e = w - *e);
            match self.feedback {
                Some(feedback) => feedback.output_error(Isa::best(), &errors),
                None => errors.iter().map(|&e| f64::from(e) * f64::from(e)).sum(),
            }
        };
        let of_type = |&ty: &GgmlType| {
            let parts: Vec<f64> = sample.par_chunks(CHUNK_ROWS).map(|rows| of_rows(ty, rows)).collect();
            parts.iter().sum()
        };
        types.par_iter().map(of_type).collect()
    }
}

/// A sequence's residual stream on its way through the layers. While matrices of one layer are tried, what lies before
/// that layer need not be computed again.
pub struct Probe<'m> {
    model: &'m Model,
    runner: Runner<'m>,
}

impl<'m> Probe<'m> {
    /// Errors: an instruction set that this machine lacks.
    pub fn new(model: &'m Model, options: &RunnerOptions) -> Result<Self> {
        Ok(Self { model, runner: Runner::new(model, options)? })
    }

    /// Stores in `x` (t, d_model) what `tokens` are before the first layer. Errors: a token outside the vocabulary.
    pub fn embed(&self, tokens: &[u32], x: &mut Vec<f32>) -> Result<()> {
        check_tokens(self.model, tokens)?;
        x.resize(tokens.len() * self.model.hparams().d_model, 0.0);
        self.runner.embed(tokens, x);
        Ok(())
    }

    /// Takes `x` (t, d_model), a whole sequence from its first token on, from before the first of `layers` to behind the
    /// last.
    ///
    /// # Panics
    /// If the model has no such layers.
    pub fn advance(&mut self, layers: Range<usize>, x: &mut [f32]) {
        self.runner.advance(&mut self.model.new_state(), layers, x);
    }

    /// Calls `each(position, logits)` for the `wanted` positions of `x` (t, d_model), which is behind the last layer, until
    /// it fails. Errors: its own; `NotFinite` if the logits hold a NaN or an infinity; `Changed` if the model's file was written to
    /// meanwhile.
    pub fn logits(
        &mut self,
        x: &[f32],
        wanted: Range<usize>,
        mut each: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let (mut finite, mut result) = (true, Ok(()));
        self.runner.read_out(x, wanted, &mut |i, logits| {
            finite &= all_finite(logits);
            if result.is_ok() {
                result = each(i, logits);
            }
        });
        check_logits(self.model, finite)?;
        result
    }
}

impl Model {
    /// The matrix of `role` in `layer`.
    pub fn matrix(&self, role: Role, layer: usize) -> Option<&Matrix> {
        let layer = self.layers.get(layer);
        match role {
            Role::TokenEmbd => Some(&self.token_embd),
            Role::Output => self.output.as_ref(),
            Role::SsmIn => layer.map(|l| &l.ssm_in),
            Role::SsmX => layer.map(|l| &l.ssm_x),
            Role::SsmDt => layer.map(|l| &l.ssm_dt),
            Role::SsmOut => layer.map(|l| &l.ssm_out),
            _ => None,
        }
    }

    /// Puts another matrix of the same shape in the place of one and returns the old one.
    ///
    /// # Panics
    /// If there is none, or its shape is another.
    pub fn replace_matrix(&mut self, role: Role, layer: usize, new: Matrix) -> Matrix {
        let place = match role {
            Role::TokenEmbd => &mut self.token_embd,
            Role::Output => self.output.as_mut().expect("an output matrix"),
            Role::SsmIn => &mut self.layers[layer].ssm_in,
            Role::SsmX => &mut self.layers[layer].ssm_x,
            Role::SsmDt => &mut self.layers[layer].ssm_dt,
            Role::SsmOut => &mut self.layers[layer].ssm_out,
            _ => panic!("{role:?} is no matrix"),
        };
        assert_eq!((place.rows, place.cols), (new.rows, new.cols));
        std::mem::replace(place, new)
    }
}
