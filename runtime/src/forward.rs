//! The forward pass of Mamba-1 and Falcon Mamba (Gu & Dao 2023, algorithm 2; the dt/B/C norms are TII's), over any
//! number of tokens at once.
//!
//! t: tokens that go together. Four forks per layer for one token; the norm adds one for many.

use crate::kernels::{Acts, Compute, InProj, Isa, Mixer, ScanWeights, Segment, Then};
use crate::matrix::Matrix;
use crate::model::{Layer, Model};
use crate::observe::{Observer, Watch};
use crate::state::State;
use kestrel_formats::Result;
use kestrel_formats::arch::{Arch, Role};
use std::ops::Range;

/// How to execute a model.
#[derive(Clone, Debug)]
pub struct RunnerOptions {
    /// Instruction set; `None` takes `KESTREL_ISA` or the best there is.
    pub isa: Option<Isa>,
    /// Threads, the caller included; 0 takes one per processor.
    pub threads: usize,
    /// Keep activations in f32 where quantized weights would take int8.
    pub precise: bool,
    /// Tokens that a long prompt is cut into.
    pub chunk: usize,
}

impl Default for RunnerOptions {
    fn default() -> Self {
        Self { isa: None, threads: 0, precise: false, chunk: 512 }
    }
}

/// Executes one model: threads, kernels and every buffer, made once. Holds no state of a sequence.
pub struct Runner<'m> {
    model: &'m Model,
    compute: Compute,
    precise: bool,
    buffers: Buffers,
}

/// What lies between the operations of a layer, for at most `chunk` tokens.
struct Buffers {
    x: Vec<f32>,      // (t, d_model) the residual stream
    normed: Acts,     // (t, d_model)
    mixer: Mixer,     // u, z, dt: (d_inner, t) each, in blocks of channels
    inner: Acts,      // (t, d_inner) u for x_proj, then y for out_proj
    dt_b_c: Vec<f32>, // (t, dt_rank + 2·d_state)
    dt: Acts,         // (t, dt_rank)
    logits: Vec<f32>, // (LOGIT_ROWS, vocab)
}

/// Tokens whose logits are computed together when all are wanted.
const LOGIT_ROWS: usize = 32;

impl<'m> Runner<'m> {
    /// Threads and buffers for `model`. Errors: `KESTREL_ISA` names an instruction set that this machine lacks.
    pub fn new(model: &'m Model, options: &RunnerOptions) -> Result<Self> {
        let isa = options.isa.map_or_else(Isa::from_env, Ok)?;
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let t = options.chunk.max(1);
        let h = model.hparams();
        let buffers = Buffers {
            x: vec![0.0; t * h.d_model],
            normed: Acts::with_capacity(t, h.d_model),
            mixer: Mixer::with_capacity(h.d_inner, t),
            inner: Acts::with_capacity(t, h.d_inner),
            dt_b_c: vec![0.0; t * h.x_proj_rows()],
            dt: Acts::with_capacity(t, h.dt_rank),
            logits: vec![0.0; t.min(LOGIT_ROWS) * h.vocab_size],
        };
        let mut compute = Compute::new(isa, threads, t);
        let beside = model.matrices().filter(|(_, m)| m.has_scales_beside());
        if let Some(cols) = beside.map(|(_, m)| m.cols).max() {
            compute.reserve_blocks(cols);
        }
        Ok(Self { model, compute, precise: options.precise, buffers })
    }

    /// The instruction set at work.
    pub fn isa(&self) -> Isa {
        self.compute.isa()
    }

    /// Threads at work.
    pub fn n_threads(&self) -> usize {
        self.compute.n_threads()
    }

    /// Tokens that go together at most.
    pub fn max_tokens(&self) -> usize {
        self.compute.max_tokens()
    }

    /// Consumes `tokens` and leaves the logits after the last one in `logits` (vocab). Tokens are below the
    /// vocabulary's size; with no tokens nothing changes.
    pub fn forward(&mut self, state: &mut State, tokens: &[u32], logits: &mut [f32]) {
        let d_model = self.model.hparams().d_model;
        let mut last = 0;
        for chunk in tokens.chunks(self.compute.max_tokens()) {
            self.layers(&mut [Segment { state, n_tokens: chunk.len() }], chunk, None);
            last = chunk.len();
        }
        if last > 0 {
            self.buffers.x.copy_within((last - 1) * d_model..last * d_model, 0);
            self.logits(1, logits);
        }
    }

    /// Tokens of several sequences at once: `tokens` are those of each segment in turn, any number of each, at most
    /// [`RunnerOptions::chunk`] together. Leaves the logits after each segment's last token in `logits` (segments,
    /// vocab). The weights are read once for all of them.
    ///
    /// # Panics
    /// If the segments' tokens are not as many as `tokens`, a segment has none, or they are more than a chunk.
    pub fn forward_segments(&mut self, segments: &mut [Segment<'_>], tokens: &[u32], logits: &mut [f32]) {
        assert!(tokens.len() <= self.compute.max_tokens(), "{} tokens at once", tokens.len());
        assert_eq!(segments.iter().map(|s| s.n_tokens).sum::<usize>(), tokens.len());
        if segments.is_empty() {
            return;
        }
        self.layers(segments, tokens, None);
        let d_model = self.model.hparams().d_model;
        let mut end = 0;
        for (i, segment) in segments.iter().enumerate() {
            assert!(segment.n_tokens > 0, "segment {i} is empty");
            end += segment.n_tokens;
            self.buffers.x.copy_within((end - 1) * d_model..end * d_model, i * d_model);
        }
        self.logits(segments.len(), logits);
    }

    /// The logits of the first `n` rows of the residual stream.
    fn logits(&mut self, n: usize, logits: &mut [f32]) {
        let (h, b) = (self.model.hparams(), &mut self.buffers);
        let output = self.model.output_matrix();
        let (x, kind) = (&b.x[..n * h.d_model], output.act_kind(self.precise));
        self.compute.norm(x, &self.model.output_norm, h.layer_norm_epsilon, kind, &mut b.normed);
        self.compute.matmul(&output.view(), &b.normed, logits, Then::Store);
    }

    /// Consumes `tokens` and calls `each(position, logits)` for every one of them.
    pub fn forward_all(&mut self, state: &mut State, tokens: &[u32], each: &mut dyn FnMut(usize, &[f32])) {
        let mut first = 0;
        for chunk in tokens.chunks(self.compute.max_tokens()) {
            self.layers(&mut [Segment { state, n_tokens: chunk.len() }], chunk, None);
            self.logits_of(0..chunk.len(), &mut |i, logits| each(first + i, logits));
            first += chunk.len();
        }
    }

    /// As [`Self::forward_segments`], with the logits after some of the tokens: `each(i, logits)` for every `i` of
    /// `wanted`, which are ascending places in `tokens`.
    ///
    /// # Panics
    /// As [`Self::forward_segments`], or if a wanted place is beyond the tokens.
    pub fn forward_wanted(
        &mut self,
        segments: &mut [Segment<'_>],
        tokens: &[u32],
        wanted: impl Iterator<Item = usize> + Clone,
        each: &mut dyn FnMut(usize, &[f32]),
    ) {
        assert!(tokens.len() <= self.compute.max_tokens(), "{} tokens at once", tokens.len());
        assert!(wanted.clone().all(|i| i < tokens.len()), "more logits than tokens");
        self.layers(segments, tokens, None);
        self.logits_of(wanted, each);
    }

    /// `each(i, logits)` for rows `wanted` of the residual stream, ascending. The rows move to the front.
    fn logits_of(
        &mut self,
        wanted: impl Iterator<Item = usize> + Clone,
        each: &mut dyn FnMut(usize, &[f32]),
    ) {
        let (h, b) = (*self.model.hparams(), &mut self.buffers);
        let mut n = 0;
        for i in wanted.clone() {
            b.x.copy_within(i * h.d_model..(i + 1) * h.d_model, n * h.d_model);
            n += 1;
        }
        let mut wanted = wanted;
        for x in b.x[..n * h.d_model].chunks(LOGIT_ROWS * h.d_model) {
            let n_tokens = x.len() / h.d_model;
            let logits = &mut b.logits[..n_tokens * h.vocab_size];
            let kind = self.model.output_matrix().act_kind(self.precise);
            self.compute.norm(x, &self.model.output_norm, h.layer_norm_epsilon, kind, &mut b.normed);
            self.compute.matmul(&self.model.output_matrix().view(), &b.normed, logits, Then::Store);
            for (row, i) in logits.chunks_exact(h.vocab_size).zip(&mut wanted) {
                each(i, row);
            }
        }
    }

    /// Consumes `tokens` and shows `observer` the inputs of every matrix, a chunk at a time. Logits are not computed.
    pub fn observe(&mut self, state: &mut State, tokens: &[u32], observer: &mut dyn Observer) {
        let (h, mut watch) = (*self.model.hparams(), Watch::new(observer));
        for chunk in tokens.chunks(self.compute.max_tokens()) {
            self.layers(&mut [Segment { state, n_tokens: chunk.len() }], chunk, Some(&mut watch));
            let (b, output) = (&mut self.buffers, self.model.output_matrix());
            let (x, kind) = (&b.x[..chunk.len() * h.d_model], output.act_kind(self.precise));
            self.compute.norm(x, &self.model.output_norm, h.layer_norm_epsilon, kind, &mut b.normed);
            watch.see(Role::Output, 0, &b.normed);
        }
    }

    /// The residual stream (tokens, d_model) before the first layer.
    pub(crate) fn embed(&self, tokens: &[u32], x: &mut [f32]) {
        self.compute.embed(&self.model.token_embd.view(), tokens, x);
    }

    /// Takes the residual stream `x` (t, d_model) of a sequence from before the first of `layers` to behind the last;
    /// `state` is advanced in these layers.
    pub(crate) fn advance(&mut self, state: &mut State, layers: Range<usize>, x: &mut [f32]) {
        let d_model = self.model.hparams().d_model;
        for x in x.chunks_mut(self.compute.max_tokens() * d_model) {
            let n_tokens = x.len() / d_model;
            self.buffers.x[..x.len()].copy_from_slice(x);
            self.through(layers.clone(), n_tokens, &[Segment { state, n_tokens }], None);
            x.copy_from_slice(&self.buffers.x[..x.len()]);
        }
    }

    /// `each(i, logits)` for the rows `wanted` of `x` (t, d_model), the residual stream behind the last layer.
    pub(crate) fn read_out(&mut self, x: &[f32], wanted: Range<usize>, each: &mut dyn FnMut(usize, &[f32])) {
        let d_model = self.model.hparams().d_model;
        let (mut first, rows) = (wanted.start, &x[wanted.start * d_model..wanted.end * d_model]);
        for x in rows.chunks(self.compute.max_tokens() * d_model) {
            self.buffers.x[..x.len()].copy_from_slice(x);
            self.logits_of(0..x.len() / d_model, &mut |i, logits| each(first + i, logits));
            first += x.len() / d_model;
        }
    }

    /// x := embeddings of `tokens`, through all layers.
    fn layers(&mut self, segments: &mut [Segment<'_>], tokens: &[u32], watch: Option<&mut Watch<'_>>) {
        let model = self.model;
        let x = &mut self.buffers.x[..tokens.len() * model.hparams().d_model];
        self.compute.embed(&model.token_embd.view(), tokens, x);
        self.through(0..model.layers.len(), tokens.len(), segments, watch);
        segments.iter_mut().for_each(|s| s.state.advance(s.n_tokens));
    }

    /// x := x through some of the layers, for `t` tokens.
    fn through(
        &mut self,
        layers: Range<usize>,
        t: usize,
        segments: &[Segment<'_>],
        mut watch: Option<&mut Watch<'_>>,
    ) {
        let model = self.model;
        for i in layers {
            self.layer(i, &model.layers[i], t, segments, watch.as_deref_mut());
        }
    }

    /// x := x + mixer(norm(x)) for `t` tokens.
    fn layer(
        &mut self,
        i: usize,
        layer: &Layer,
        t: usize,
        segments: &[Segment<'_>],
        mut watch: Option<&mut Watch<'_>>,
    ) {
        let h = self.model.hparams();
        let precise = self.precise;
        let kind = |m: &Matrix| m.act_kind(precise);
        let mut see = |role, acts: &Acts| {
            if let Some(watch) = &mut watch {
                watch.see(role, i, acts);
            }
        };
        let (c, b) = (&mut self.compute, &mut self.buffers);
        let x = &mut b.x[..t * h.d_model]; // (t, d_model)
        let dt_b_c = &mut b.dt_b_c[..t * h.x_proj_rows()]; // (t, dt_rank + 2·d_state)

        // normed (t, d_model) = x / rms(x) · attn_norm
        c.norm(x, &layer.attn_norm, h.layer_norm_epsilon, kind(&layer.ssm_in), &mut b.normed);
        see(Role::SsmIn, &b.normed);

        // u, z (t, d_inner) = in_proj · normed;  u = silu(conv1d(u))
        let in_proj = InProj {
            weights: layer.ssm_in.view(),
            conv_weight: &layer.conv_weight,
            conv_bias: &layer.conv_bias,
            d_conv: h.d_conv,
        };
        c.in_proj(&in_proj, &b.normed, segments, i, &mut b.mixer, kind(&layer.ssm_x), &mut b.inner);
        see(Role::SsmX, &b.inner);

        // dt (t, dt_rank), B (t, d_state), C (t, d_state) = x_proj · u;  each / rms in Falcon Mamba
        c.matmul(&layer.ssm_x.view(), &b.inner, dt_b_c, Then::Store);
        let eps = (h.arch == Arch::FalconMamba).then_some(h.mixer_rms_eps);
        c.split_dt_b_c(dt_b_c, h.dt_rank, h.d_state, eps, kind(&layer.ssm_dt), &mut b.dt);
        see(Role::SsmDt, &b.dt);

        // Δ (t, d_inner) = softplus(dt_proj · dt + dt_bias)
        // h (d_inner, d_state) = exp(Δ·A)·h + Δ·B·u;  y (t, d_inner) = (C·h + D·u) · silu(z)
        let scan = ScanWeights {
            dt_proj: layer.ssm_dt.view(),
            dt_bias: &layer.dt_bias,
            a: &layer.a,
            d: &layer.d,
            d_state: h.d_state,
        };
        c.scan(&scan, &b.dt, dt_b_c, segments, i, &mut b.mixer, kind(&layer.ssm_out), &mut b.inner);
        see(Role::SsmOut, &b.inner);

        // x (t, d_model) += out_proj · y
        c.matmul(&layer.ssm_out.view(), &b.inner, x, Then::Add);
    }
}
