//! From logits to the next token: repetition penalty, top-k, top-p, min-p, temperature, in this order (llama.cpp's),
//! then one draw. A temperature of zero is greedy.

use kestrel_formats::{Error, ErrorKind, Result};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{RngCore, SeedableRng};

/// What the user chose. `Default` is greedy with everything else off.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set whose probability reaches p; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 drops none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens (Keskar et al. 2019); 1 is off.
    pub repeat_penalty: f32,
    /// How many recent tokens, prompt included, are penalised.
    pub repeat_last_n: usize,
    /// Fixes every draw.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// Refuses values that have no meaning (negative, NaN, a probability above 1).
    pub fn validate(&self) -> Result<()> {
        let bad = |name: &str, expected: &str, found: f32| {
            Err(Error::new(ErrorKind::Usage).what(name).expected(expected).found(found))
        };
        if !(0.0..=1e6).contains(&self.temperature) {
            return bad("--temp", "a number from 0 to 1000000", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("--top-p", "a number above 0 and at most 1", self.top_p);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("--min-p", "a number from 0 to 1", self.min_p);
        }
        if !(self.repeat_penalty > 0.0 && self.repeat_penalty <= 1e6) {
            return bad("--repeat-penalty", "a number above 0", self.repeat_penalty);
        }
        Ok(())
    }
}

/// A token that is still in the running.
#[derive(Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    /// exp(logit - max), filled in when probabilities are needed.
    weight: f32,
}

/// Draws tokens. Holds the random state and the recent tokens, and no reference to a model.
pub struct Sampler {
    options: SamplerOptions,
    rng: Pcg64Mcg,
    /// Ring of the last `repeat_last_n` tokens.
    recent: std::collections::VecDeque<u32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler for a vocabulary of any size. Errors: an option out of range.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.validate()?;
        let rng = Pcg64Mcg::seed_from_u64(options.seed);
        Ok(Self { options, rng, recent: Default::default(), candidates: Vec::new() })
    }

    /// Remembers a token of the prompt or of the output for the repetition penalty.
    pub fn accept(&mut self, token: u32) {
        if self.options.repeat_last_n == 0 {
            return;
        }
        if self.recent.len() == self.options.repeat_last_n {
            self.recent.pop_front();
        }
        self.recent.push_back(token);
    }

    /// The next token for `logits` (vocab). Does not call [`Self::accept`].
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let penalised = self.options.repeat_penalty != 1.0 && !self.recent.is_empty();
        if self.options.temperature == 0.0 && !penalised {
            return argmax(logits);
        }
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(id, &logit)| Candidate {
            id: id as u32,
            logit,
            weight: 0.0,
        }));
        if penalised {
            self.penalise();
        }
        if self.options.temperature == 0.0 {
            let best = self.candidates.iter().reduce(|a, b| if b.logit > a.logit { b } else { a });
            return best.map_or(0, |c| c.id);
        }
        self.top_k();
        self.weigh(1.0);
        self.top_p();
        self.min_p();
        self.weigh(self.options.temperature);
        self.draw()
    }

    fn penalise(&mut self) {
        let penalty = self.options.repeat_penalty;
        for (i, &token) in self.recent.iter().enumerate() {
            // Each token once, however often it occurred.
            if self.recent.iter().take(i).any(|&t| t == token) {
                continue;
            }
            if let Some(c) = self.candidates.get_mut(token as usize) {
                c.logit = if c.logit > 0.0 { c.logit / penalty } else { c.logit * penalty };
            }
        }
    }

    /// Keeps the k best, best first; ties go to the lower id.
    fn top_k(&mut self) {
        let by_logit = |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id));
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_logit);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(by_logit);
    }

    fn weigh(&mut self, temperature: f32) {
        let max = self.candidates.first().map_or(0.0, |c| c.logit);
        for c in &mut self.candidates {
            c.weight = ((c.logit - max) / temperature).exp();
        }
    }

    fn top_p(&mut self) {
        if self.options.top_p >= 1.0 {
            return;
        }
        let total: f32 = self.candidates.iter().map(|c| c.weight).sum();
        let mut mass = 0.0;
        let enough = self.candidates.iter().position(|c| {
            mass += c.weight;
            mass >= self.options.top_p * total
        });
        if let Some(last) = enough {
            self.candidates.truncate(last + 1);
        }
    }

    fn min_p(&mut self) {
        let floor = self.options.min_p;
        let keep = self.candidates.iter().take_while(|c| c.weight >= floor).count().max(1);
        self.candidates.truncate(keep);
    }

    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.weight)).sum();
        // 53 random bits, uniform in [0, 1).
        let uniform = (self.rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        let mut left = uniform * total;
        for c in &self.candidates {
            left -= f64::from(c.weight);
            if left < 0.0 {
                return c.id;
            }
        }
        // Rounding can leave a crumb; NaN logits leave everything. The best candidate is always valid.
        self.candidates.first().map_or(0, |c| c.id)
    }
}

/// The index of the largest logit; the lowest index wins a tie, NaN never wins.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    let mut best_logit = f32::NEG_INFINITY;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > best_logit {
            (best, best_logit) = (i, logit);
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl FnOnce(&mut SamplerOptions)) -> Sampler {
        let mut options = SamplerOptions { temperature: 1.0, seed: 1, ..Default::default() };
        change(&mut options);
        Sampler::new(options).unwrap()
    }

    fn counts(s: &mut Sampler, logits: &[f32], n: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            counts[s.sample(logits) as usize] += 1;
        }
        counts
    }

    #[test]
    fn zero_temperature_is_the_argmax_and_ties_go_low() {
        let mut s = sampler(|o| o.temperature = 0.0);
        assert_eq!(s.sample(&[0.0, 2.0, 2.0, f32::NAN]), 1);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let c = counts(&mut sampler(|_| ()), &logits, 80_000);
        for (got, want) in c.iter().zip([10_000.0, 20_000.0, 50_000.0]) {
            // five standard deviations of a binomial count
            assert!((*got as f64 - want).abs() < 5.0 * 160.0, "{c:?}");
        }
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [5f32.ln(), 3f32.ln(), 2f32.ln(), 0.0]; // 5 3 2 1 of 11
        assert_eq!(counts(&mut sampler(|o| o.top_k = 2), &logits, 500)[2..], [0, 0]);
        assert_eq!(counts(&mut sampler(|o| o.top_p = 0.7), &logits, 500)[2..], [0, 0]);
        let c = counts(&mut sampler(|o| o.top_p = 0.73), &logits, 500);
        assert!(c[2] > 0 && c[3] == 0, "{c:?}");
        let c = counts(&mut sampler(|o| o.min_p = 0.3), &logits, 500);
        assert!(c[2] > 0 && c[3] == 0, "{c:?}");
    }

    #[test]
    fn a_temperature_flattens_and_sharpens() {
        let logits = [1.0, 0.0];
        let cold = counts(&mut sampler(|o| o.temperature = 0.2), &logits, 2000)[0];
        let hot = counts(&mut sampler(|o| o.temperature = 5.0), &logits, 2000)[0];
        assert!(cold > 1950 && hot < 1250, "{cold} {hot}");
    }

    #[test]
    fn the_penalty_reaches_recent_tokens_only() {
        let mut s = sampler(|o| {
            o.temperature = 0.0;
            o.repeat_penalty = 2.0;
            o.repeat_last_n = 2;
        });
        let logits = [1.0, 0.9, -0.1];
        s.accept(0);
        assert_eq!(s.sample(&logits), 1);
        s.accept(1);
        assert_eq!(s.sample(&logits), 0, "both halved: 0.5 against 0.45");
        s.accept(1);
        s.accept(1);
        assert_eq!(s.sample(&logits), 0, "token 0 is no longer recent");
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        let (mut a, mut b) = (sampler(|_| ()), sampler(|_| ()));
        assert!((0..50).all(|_| a.sample(&logits) == b.sample(&logits)));
    }

    #[test]
    fn nonsense_is_refused_and_nan_logits_do_not_panic() {
        for bad in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(Sampler::new(SamplerOptions { temperature: bad, ..Default::default() }).is_err());
        }
        assert!(Sampler::new(SamplerOptions { top_p: 0.0, ..Default::default() }).is_err());
        let _ = sampler(|o| o.top_p = 0.5).sample(&[f32::NAN; 4]);
        let _ = sampler(|_| ()).sample(&[]);
    }
}
