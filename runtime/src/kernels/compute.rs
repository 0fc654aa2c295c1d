//! The operations of the forward pass over all threads. Each is one fork and join.

use super::acts::{ActKind, Acts};
use super::beside;
use super::elementwise::{Conv, D_CONV_MAX, Run, Scan};
use super::isa::Isa;
use super::matmul::{INT_PANEL_TOKENS, Job, MatrixRef, Scratch};
use super::memory::{Aligned, ByChannel, Channels, LANES, Out, SharedMut};
use super::table::{Kernels, kernels};
use crate::pool::Pool;
use crate::state::State;
use kestrel_formats::WeightType;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads, the kernels that they run and what each of them needs.
pub struct Compute {
    pool: Pool,
    kernels: &'static Kernels,
    scratch: Vec<Scratch>,
    max_tokens: usize,
}

/// What a matrix product does with what its output holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Replace it.
    Store,
    /// Add to it.
    Add,
}

/// The first half of a mixer: in_proj, convolution, SiLU.
#[derive(Clone, Copy)]
pub struct InProj<'a> {
    /// (2·d_inner, d_model): x rows, then z rows.
    pub weights: MatrixRef<'a>,
    /// (d_inner, d_conv), the newest input's tap last.
    pub conv_weight: &'a ByChannel,
    /// (d_inner)
    pub conv_bias: &'a [f32],
    /// Taps.
    pub d_conv: usize,
}

/// The second half of a mixer: dt_proj, selective scan, gate.
#[derive(Clone, Copy)]
pub struct ScanWeights<'a> {
    /// (d_inner, dt_rank)
    pub dt_proj: MatrixRef<'a>,
    /// (d_inner)
    pub dt_bias: &'a [f32],
    /// (d_inner, d_state), negative.
    pub a: &'a ByChannel,
    /// (d_inner)
    pub d: &'a [f32],
    /// States per channel.
    pub d_state: usize,
}

/// The d_inner-wide activations of a mixer.
pub struct Mixer {
    /// x, then u = silu(conv(x)), then the mixer's output y.
    pub u: Channels,
    /// The gate.
    pub z: Channels,
    /// dt_proj's output.
    pub dt: Channels,
    d_inner: usize,
}

impl Mixer {
    /// Room for `n_tokens` of `d_inner` channels.
    pub fn with_capacity(d_inner: usize, n_tokens: usize) -> Self {
        let channels = || Channels::with_capacity(d_inner, n_tokens);
        Self { u: channels(), z: channels(), dt: channels(), d_inner }
    }
}

/// Consecutive tokens of one sequence among those that are computed together, and what the sequence remembers.
pub struct Segment<'a> {
    /// Advanced by its tokens.
    pub state: &'a mut State,
    /// How many of the tokens are this sequence's.
    pub n_tokens: usize,
}

/// Each segment with where its tokens are. They must be `n_all` together.
fn runs<'a>(segments: &'a [Segment<'_>], n_all: usize) -> impl Iterator<Item = (&'a State, Run)> {
    let mut first = 0;
    segments.iter().map(move |s| {
        let run = Run { first, n_tokens: s.n_tokens, n_all };
        first += s.n_tokens;
        assert!(first <= n_all, "more tokens in segments than there are");
        (&*s.state, run)
    })
}

/// `0..n` in whole units over workers: most of it in parts as equal as they go, one for each; the rest to whoever is done
/// first, since cores that are shared with others are not equally fast. Of this rest one takes a part that shrinks with it:
/// each part costs a beginning, at which nothing has been fetched ahead, and the last ones decide how long others wait.
struct Turns {
    n: usize,
    unit: usize,
    n_workers: usize,
    /// The units of the workers' own parts.
    n_own: usize,
    /// The first unit that nobody has taken.
    next: AtomicUsize,
}

impl Turns {
    fn new(n: usize, unit: usize, n_workers: usize) -> Self {
        let n_own = if n_workers == 1 { n.div_ceil(unit) } else { n.div_ceil(unit) / 8 * 7 };
        Self { n, unit, n_workers, n_own, next: AtomicUsize::new(n_own) }
    }

    /// What worker `w` does.
    fn of(&self, w: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let at = move |w: usize| self.n_own * w / self.n_workers;
        let units = move |units: Range<usize>| units.start * self.unit..(units.end * self.unit).min(self.n);
        let n_units = self.n.div_ceil(self.unit);
        let end = move |unit: usize| unit + ((n_units - unit) / (4 * self.n_workers)).max(1);
        let more = std::iter::from_fn(move || {
            let take = |unit| (unit < n_units).then(|| end(unit));
            let unit = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
            Some(units(unit..end(unit)))
        });
        std::iter::once(units(at(w)..at(w + 1))).filter(|own| !own.is_empty()).chain(more)
    }

    /// The same of the rows of `weights` that meet `n_tokens`. If these are few, the beginning of a part is fetched while the
    /// last unit of the one before, which is a part of its own then, is at work.
    fn of_rows(
        &self,
        w: usize,
        weights: MatrixRef<'_>,
        n_tokens: usize,
    ) -> impl Iterator<Item = Range<usize>> {
        let (few, unit) = (n_tokens < INT_PANEL_TOKENS, self.unit);
        let cut = move |part: Range<usize>| {
            let last = if few { part.start + (part.len() - 1) / unit * unit } else { part.start };
            [part.start..last, last..part.end].into_iter().filter(|part| !part.is_empty())
        };
        let mut parts = self.of(w).flat_map(cut).peekable();
        std::iter::from_fn(move || {
            let part = parts.next()?;
            if few
                && let Some(next) = parts.peek()
                && next.start != part.end
            {
                weights.fetch(next.start);
            }
            Some(part)
        })
    }
}

/// The part of `0..n` that worker `w` of `n_workers` owns: whole units, as equal as they go.
fn share(n: usize, unit: usize, w: usize, n_workers: usize) -> Range<usize> {
    let units = n.div_ceil(unit);
    let at = |w: usize| (units * w / n_workers * unit).min(n);
    at(w)..at(w + 1)
}

impl Compute {
    /// `n_threads` workers (the caller is one of them) for at most `max_tokens` at a time.
    pub fn new(isa: Isa, n_threads: usize, max_tokens: usize) -> Self {
        let pool = Pool::new(n_threads);
        let scratch = (0..pool.n_workers()).map(|_| Scratch::new(max_tokens)).collect();
        Self { pool, kernels: kernels(isa), scratch, max_tokens }
    }

    /// Makes room for products of matrices with scales beside their codes, of at most `cols` columns.
    pub fn reserve_blocks(&mut self, cols: usize) {
        self.scratch.iter_mut().for_each(|s| s.blocks = Aligned::zeroed(beside::scratch_bytes(cols)));
    }

    /// The instruction set at work.
    pub fn isa(&self) -> Isa {
        self.kernels.isa()
    }

    /// Workers.
    pub fn n_threads(&self) -> usize {
        self.pool.n_workers()
    }

    /// Tokens that go together at most.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// `out` (tokens, cols) := rows `tokens` of `table`. A token must be a row.
    pub fn embed(&self, table: &MatrixRef<'_>, tokens: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), tokens.len() * table.cols);
        for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(table.cols)) {
            table.expand(token as usize, 0, out);
        }
    }

    /// `acts` := x / rms(x) · weight for each row of `x` (n_tokens, d_model), stored as `kind`.
    pub fn norm(&mut self, x: &[f32], weight: &[f32], eps: f32, kind: ActKind, acts: &mut Acts) {
        let n_tokens = x.len() / weight.len();
        assert!(n_tokens * weight.len() == x.len());
        acts.reset(kind, n_tokens, weight.len());
        let to = acts.writer();
        let (kernels, n_workers) = (self.kernels, self.pool.n_workers());
        let rows = |tokens: Range<usize>| {
            for t in tokens {
                let row = &x[t * weight.len()..][..weight.len()];
                // SAFETY: the table's instruction set is present; each token is one worker's.
                unsafe { (kernels.rms_norm_acts)(row, weight, eps, &to, t) };
            }
        };
        if n_tokens < 4 * n_workers {
            rows(0..n_tokens); // less work than a fork
        } else {
            self.pool.run(|w| rows(share(n_tokens, 1, w, n_workers)));
        }
    }

    /// Splits x_proj's output `x` (n_tokens, dt_rank + 2·d_state): dt goes to `dt` as `kind`; B and C stay. With
    /// `eps`, all three are divided by their rms first.
    pub fn split_dt_b_c(
        &mut self,
        x: &mut [f32],
        dt_rank: usize,
        d_state: usize,
        eps: Option<f32>,
        kind: ActKind,
        dt: &mut Acts,
    ) {
        let width = dt_rank + 2 * d_state;
        assert!(x.len().is_multiple_of(width));
        dt.reset(kind, x.len() / width, dt_rank);
        let to = dt.writer();
        for (t, row) in x.chunks_exact_mut(width).enumerate() {
            let (step, b_c) = row.split_at_mut(dt_rank);
            if let Some(eps) = eps {
                let (b, c) = b_c.split_at_mut(d_state);
                for part in [&mut *step, b, c] {
                    self.kernels.rms_norm(part, eps);
                }
            }
            // SAFETY: the table's instruction set is present; only this thread writes.
            unsafe { (self.kernels.row_acts)(step, &to, t) };
        }
    }

    /// `out` (n_tokens, rows) := or += `acts` · `weights`ᵀ.
    pub fn matmul(&mut self, weights: &MatrixRef<'_>, acts: &Acts, out: &mut [f32], then: Then) {
        assert_eq!(out.len(), acts.n_tokens() * weights.rows);
        let out = Out::token_major(out, weights.rows, then == Then::Add);
        let (kernels, n_workers) = (self.kernels, self.pool.n_workers());
        let scratch = SharedMut::new(&mut self.scratch);
        let turns = Turns::new(weights.rows, row_unit(acts.n_tokens(), weights.rows, n_workers), n_workers);
        self.pool.run(|w| {
            // SAFETY: each worker takes its own.
            let scratch = unsafe { &mut scratch.part(w..w + 1)[0] };
            for rows in turns.of_rows(w, *weights, acts.n_tokens()) {
                // SAFETY: the rows of different turns are disjoint.
                unsafe { product(kernels, &Job { weights: *weights, rows, acts, out }, scratch) };
            }
        });
    }

    /// x, z := in_proj · `acts`; u := silu(conv(x) + bias). Leaves u in `mixer.u` and, as `kind`, in `u_acts`; z in
    /// `mixer.z`. `segments` say whose tokens these are; of their states `layer_index` is used.
    #[allow(clippy::too_many_arguments)] // weights, inputs, states, outputs
    pub fn in_proj(
        &mut self,
        layer: &InProj<'_>,
        acts: &Acts,
        segments: &[Segment<'_>],
        layer_index: usize,
        mixer: &mut Mixer,
        kind: ActKind,
        u_acts: &mut Acts,
    ) {
        let (d_inner, n_tokens, d_conv) = (mixer.d_inner, acts.n_tokens(), layer.d_conv);
        assert!(layer.weights.rows == 2 * d_inner && layer.conv_bias.len() == d_inner);
        assert!(layer.conv_weight.is_of(d_inner, d_conv) && (1..=D_CONV_MAX).contains(&d_conv));
        mixer.u.set_tokens(n_tokens);
        mixer.z.set_tokens(n_tokens);
        u_acts.reset(kind, n_tokens, d_inner);
        let halves = [layer.weights.slice(0..d_inner), layer.weights.slice(d_inner..2 * d_inner)];
        let to = u_acts.writer();
        let unit = channel_unit(kind);
        let z_out = Out::blocked(mixer.z.numbers_mut(), n_tokens);
        let u_out = Out::blocked(mixer.u.numbers_mut(), n_tokens);
        let (kernels, n_workers) = (self.kernels, self.pool.n_workers());
        let scratch = SharedMut::new(&mut self.scratch);
        let turns = Turns::new(d_inner, unit, n_workers);
        // The gate is needed later only, so that its rows can make up for the large units before them.
        let gate_turns = Turns::new(d_inner, row_unit(n_tokens, d_inner, n_workers), n_workers);
        self.pool.run(|w| {
            // SAFETY: each worker takes its own.
            let scratch = unsafe { &mut scratch.part(w..w + 1)[0] };
            for c in turns.of(w).flat_map(|own| units(own, unit)) {
                let blocks = c.start / LANES..c.end.div_ceil(LANES);
                // SAFETY: channels of different workers and units are disjoint and whole blocks of 16, and so are
                // the parts made of them, each sequence's state included, which its segment borrows exclusively; each
                // part is dropped before the next unit.
                unsafe {
                    product(kernels, &Job { weights: halves[0], rows: c.clone(), acts, out: u_out }, scratch);
                    let x = u_out.part(blocks.clone());
                    let taps = layer.conv_weight.part(blocks.clone());
                    for (state, run) in runs(segments, n_tokens) {
                        let state = state.conv().part(layer_index, blocks.clone());
                        let conv = Conv { taps, bias: &layer.conv_bias[c.clone()], d_conv, run };
                        (kernels.conv_silu)(&conv, x, state);
                    }
                    (kernels.channel_acts)(x, n_tokens, &to, c.start, c.len());
                }
            }
            for rows in gate_turns.of_rows(w, halves[1], n_tokens) {
                // SAFETY: the rows of different turns are disjoint.
                unsafe { product(kernels, &Job { weights: halves[1], rows, acts, out: z_out }, scratch) };
            }
        });
    }

    /// Δ := softplus(dt_proj · `dt_acts` + bias), the selective scan over u with B and C of `x_dbc` (n_tokens,
    /// dt_rank + 2·d_state), and y := (scan + D·u) · silu(z). Leaves y in `mixer.u` and, as `kind`, in `y_acts`. Segments
    /// as for [`Self::in_proj`].
    #[allow(clippy::too_many_arguments)] // weights, inputs, state, outputs
    pub fn scan(
        &mut self,
        layer: &ScanWeights<'_>,
        dt_acts: &Acts,
        x_dbc: &[f32],
        segments: &[Segment<'_>],
        layer_index: usize,
        mixer: &mut Mixer,
        kind: ActKind,
        y_acts: &mut Acts,
    ) {
        let (d_inner, d_state, n_tokens) = (mixer.d_inner, layer.d_state, dt_acts.n_tokens());
        let width = layer.dt_proj.cols + 2 * d_state;
        assert!(layer.dt_proj.rows == d_inner && x_dbc.len() == n_tokens * width);
        assert!(
            layer.d.len() == d_inner && layer.dt_bias.len() == d_inner && layer.a.is_of(d_inner, d_state)
        );
        mixer.dt.set_tokens(n_tokens);
        y_acts.reset(kind, n_tokens, d_inner);
        let (to, z) = (y_acts.writer(), mixer.z.numbers());
        let unit = channel_unit(kind);
        let dt_out = Out::blocked(mixer.dt.numbers_mut(), n_tokens);
        let u_out = Out::blocked(mixer.u.numbers_mut(), n_tokens);
        let (kernels, n_workers) = (self.kernels, self.pool.n_workers());
        let scratch = SharedMut::new(&mut self.scratch);
        let turns = Turns::new(d_inner, unit, n_workers);
        self.pool.run(|w| {
            // SAFETY: each worker takes its own.
            let scratch = unsafe { &mut scratch.part(w..w + 1)[0] };
            for c in turns.of(w).flat_map(|own| units(own, unit)) {
                let blocks = c.start / LANES..c.end.div_ceil(LANES);
                let numbers = blocks.start * n_tokens * LANES..blocks.end * n_tokens * LANES;
                // SAFETY: as in `in_proj`.
                unsafe {
                    let job = Job { weights: layer.dt_proj, rows: c.clone(), acts: dt_acts, out: dt_out };
                    product(kernels, &job, scratch);
                    let (u, dt) = (u_out.part(blocks.clone()), dt_out.part(blocks.clone()));
                    let a = layer.a.part(blocks.clone());
                    for (state, run) in runs(segments, n_tokens) {
                        let scan = Scan {
                            a,
                            d: &layer.d[c.clone()],
                            dt_bias: &layer.dt_bias[c.clone()],
                            d_state,
                            run,
                            bc: x_dbc.get(layer.dt_proj.cols..).unwrap_or(&[]),
                            bc_stride: width,
                        };
                        let state = state.ssm().part(layer_index, blocks.clone());
                        (kernels.scan)(&scan, u, &z[numbers.clone()], dt, state);
                    }
                    (kernels.channel_acts)(u, n_tokens, &to, c.start, c.len());
                }
            }
        });
    }
}

/// Rows of a product that go to a worker at once after its own part. What one does when the others are done is lost time,
/// which matters where a matrix has few rows or is read within microseconds; a panel should not be too low either.
fn row_unit(n_tokens: usize, n_rows: usize, n_workers: usize) -> usize {
    if n_tokens < INT_PANEL_TOKENS {
        return LANES;
    }
    (n_rows / (8 * n_workers)).next_multiple_of(2 * LANES).clamp(2 * LANES, 4 * LANES)
}

/// Channels go in pieces of this, so that each quantization block has one owner, and that a piece stays in its worker's
/// cache between the operations on it.
fn channel_unit(kind: ActKind) -> usize {
    const CHANNELS: usize = 256;
    kind.block_len().max(CHANNELS)
}

/// `channels` in such pieces.
fn units(channels: Range<usize>, unit: usize) -> impl Iterator<Item = Range<usize>> {
    let end = channels.end;
    channels.step_by(unit).map(move |c| c..(c + unit).min(end))
}

/// The product that fits the activations.
///
/// # Safety
/// No other worker accesses the job's rows of the output.
unsafe fn product(kernels: &Kernels, job: &Job<'_>, scratch: &mut Scratch) {
    assert_eq!(job.acts.cols(), job.weights.cols, "the activations' columns are the weights'");
    let kind = job.acts.kind();
    // SAFETY: the table's instruction set is present, kind and columns are checked, the rest is the caller's.
    unsafe {
        match (kind, job.weights.dtype) {
            (ActKind::F32, _) => (kernels.f32_matmul)(job, scratch),
            (_, WeightType::Ggml(ty)) => {
                assert_eq!(kind, ActKind::for_weights(ty, false), "the kind that the weights take");
                (kernels.int_matmul)(job, scratch);
            }
            (_, other) => {
                assert_eq!(kind, ActKind::for_weights_of_bnb(other), "the kind that the weights take");
                beside::int_matmul(kernels, job, scratch);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kestrel_formats::GgmlType;

    #[test]
    fn every_row_has_one_turn() {
        for (rows, n_workers) in [(1, 2), (16, 2), (100, 1), (288, 2), (4096, 2), (4096, 3), (65024, 16)] {
            let bytes = vec![0; 2 * rows];
            let weights = MatrixRef::new(GgmlType::F16, rows, 1, &bytes).unwrap();
            for n_tokens in [1, INT_PANEL_TOKENS] {
                let turns = Turns::new(rows, LANES, n_workers);
                let mut seen = vec![0; rows];
                for w in (0..n_workers).rev() {
                    for part in turns.of_rows(w, weights, n_tokens) {
                        assert!(!part.is_empty() && part.start.is_multiple_of(LANES), "{part:?} of {rows}");
                        seen[part].iter_mut().for_each(|n| *n += 1);
                    }
                }
                assert!(seen.iter().all(|&n| n == 1), "{rows} rows, {n_workers} workers, {n_tokens} tokens");
            }
        }
    }
}
