//! What goes into the matrices while a model reads a text: the numbers that importance matrices and error feedback of
//! quantization are made of.

use crate::kernels::Acts;
use kestrel_formats::arch::{Role, spec};
use kestrel_formats::calibration::group_len;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

/// Sees the inputs of every matrix; see [`crate::Session::observe`].
pub trait Observer {
    /// `rows` (n_tokens, cols) are what the matrix `role` of `layer` multiplies, one row per token: ssm_in, ssm_x,
    /// ssm_dt and ssm_out of each layer in turn, then the output matrix as [`Role::Output`] of layer 0, tied or not.
    ///
    /// The numbers are those that are really multiplied. Beside quantized weights that is int8 times a scale, unless
    /// [`crate::RunnerOptions::precise`] keeps f32.
    fn input(&mut self, role: Role, layer: usize, cols: usize, rows: &[f32]);
}

/// An observer at work, with the rows that it is shown.
pub(crate) struct Watch<'a> {
    observer: &'a mut dyn Observer,
    rows: Vec<f32>,
}

impl<'a> Watch<'a> {
    pub(crate) fn new(observer: &'a mut dyn Observer) -> Self {
        Self { observer, rows: Vec::new() }
    }

    pub(crate) fn see(&mut self, role: Role, layer: usize, acts: &Acts) {
        self.rows.clear();
        (0..acts.n_tokens()).for_each(|t| self.rows.extend(acts.to_f32(t)));
        self.observer.input(role, layer, acts.cols(), &self.rows);
    }
}

/// Sums of squared inputs per column of every matrix, as an importance matrix holds them.
#[derive(Clone, Debug, Default)]
pub struct ColumnEnergy {
    /// By GGUF name: sums (cols), and how many inputs they are over.
    sums: BTreeMap<String, (Vec<f32>, f32)>,
    /// Of one piece of text (cols).
    piece: Vec<f64>,
    tied: bool,
}

impl ColumnEnergy {
    /// No sums yet. `tied` names the inputs of the output matrix after the embedding, which it then is.
    pub fn new(tied: bool) -> Self {
        Self { tied, ..Self::default() }
    }

    /// Continues from sums that were made before.
    pub fn add(&mut self, gguf_name: &str, sums: &[f32], count: f32) {
        self.sums.insert(gguf_name.to_owned(), (sums.to_vec(), count));
    }

    /// Each matrix's GGUF name, sums of squares (cols), and how many inputs they are over.
    pub fn sums(&self) -> impl Iterator<Item = (&str, &[f32], f32)> {
        self.sums.iter().map(|(name, (sums, count))| (name.as_str(), sums.as_slice(), *count))
    }
}

impl Observer for ColumnEnergy {
    /// A piece's sums are f64. They are added in f32, so that going on from a file changes no bit.
    fn input(&mut self, role: Role, layer: usize, cols: usize, rows: &[f32]) {
        self.piece.clear();
        self.piece.resize(cols, 0.0);
        for row in rows.chunks_exact(cols) {
            self.piece.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
        }
        let role = if self.tied && role == Role::Output { Role::TokenEmbd } else { role };
        let (sums, count) = self.sums.entry(spec(role).gguf_name(layer)).or_default();
        sums.resize(cols, 0.0);
        sums.iter_mut().zip(&self.piece).for_each(|(sum, piece)| *sum += *piece as f32);
        *count += (rows.len() / cols) as f32;
    }
}

/// Products of the inputs of matrices, x x^T summed over tokens, of columns in groups; see
/// [`kestrel_formats::calibration`].
pub struct ColumnProducts {
    layers: Range<usize>,
    /// Columns of a group at most.
    most: usize,
    tied: bool,
    sums: BTreeMap<String, Products>,
}

struct Products {
    group: usize,
    /// (cols / group, group, group), of which only what is right of the diagonal is summed.
    sums: Vec<f32>,
    count: usize,
}

impl ColumnProducts {
    /// Nothing yet, of these layers only; the output matrix goes with layer 0. `most` columns form a group at most,
    /// `tied` names the output matrix after the embedding, which it then is.
    pub fn new(layers: Range<usize>, most: usize, tied: bool) -> Self {
        Self { layers, most, tied, sums: BTreeMap::new() }
    }

    /// Each matrix's GGUF name, the mean of its inputs' products (cols / group, group, group), and how many inputs there
    /// were.
    pub fn means(self) -> impl Iterator<Item = (String, Vec<f32>, usize)> {
        self.sums.into_iter().map(|(name, Products { group, mut sums, count })| {
            for square in sums.chunks_mut(group * group) {
                for i in 0..group {
                    for j in i..group {
                        let mean = square[i * group + j] / count as f32;
                        (square[i * group + j], square[j * group + i]) = (mean, mean);
                    }
                }
            }
            (name, sums, count)
        })
    }
}

/// Rows of products that are summed together, so that they stay in the first-level cache.
const PRODUCT_ROWS: usize = 8;

impl Observer for ColumnProducts {
    /// Every sum is over the tokens in order, whatever the number of threads.
    fn input(&mut self, role: Role, layer: usize, cols: usize, rows: &[f32]) {
        if !self.layers.contains(&layer) {
            return;
        }
        let role = if self.tied && role == Role::Output { Role::TokenEmbd } else { role };
        let group = group_len(cols, self.most);
        let entry = self.sums.entry(spec(role).gguf_name(layer)).or_insert_with(|| Products {
            group,
            sums: vec![0.0; cols * group],
            count: 0,
        });
        entry.count += rows.len() / cols;
        entry.sums.par_chunks_mut(PRODUCT_ROWS * group).enumerate().for_each(|(i, products)| {
            let first = i * PRODUCT_ROWS; // column that the first row belongs to
            let start = first / group * group;
            for x in rows.chunks_exact(cols) {
                let x = &x[start..start + group];
                for (r, products) in products.chunks_exact_mut(group).enumerate() {
                    let from = first + r - start;
                    let factor = x[from];
                    products[from..].iter_mut().zip(&x[from..]).for_each(|(sum, x)| *sum += factor * x);
                }
            }
        });
    }
}
