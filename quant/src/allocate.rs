//! Which type each matrix gets, so that a file has a given size and its predictions move as little as possible.
//!
//! The divergence of the whole model is predicted as the sum of the divergences of each matrix alone. That holds while
//! errors are small and independent.

use kestrel_formats::GgmlType;

/// One type that a matrix may get.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The type.
    pub ty: GgmlType,
    /// Bytes of the matrix in it.
    pub n_bytes: u64,
    /// Divergence of the model with only this matrix in it.
    pub kl: f64,
}

/// What an allocation must keep to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At most so many bytes of all matrices together.
    Bytes(u64),
    /// At most this divergence, as predicted.
    Kl(f64),
}

/// Parts that a goal is divided into. A state is kept for each: enough that hundreds of matrices end close to the goal,
/// few enough for a moment of time and some MiB.
const PARTS: usize = 1 << 14;

/// Choices so far that cost about as much as those of no other state.
#[derive(Clone, Copy)]
struct State {
    /// What the goal limits.
    cost: f64,
    /// What is to be small.
    value: f64,
}

/// The index of the choice for each matrix. `None` if even the smallest are too large, or the best too far away, or a
/// matrix has no choice.
///
/// A multiple-choice knapsack: matrix by matrix, the best choices for each part of the goal that they may use up. Costs
/// are added up as they are, so that nothing is lost to rounding. That choices of one part compete may lose a part of the
/// goal with each matrix; in practice the result is the best there is.
///
/// # Panics
/// If a matrix has more than 256 choices.
pub fn allocate(matrices: &[Vec<Choice>], goal: Goal) -> Option<Vec<usize>> {
    let of = |c: &Choice| match goal {
        Goal::Bytes(_) => State { cost: c.n_bytes as f64, value: c.kl },
        Goal::Kl(_) => State { cost: c.kl, value: c.n_bytes as f64 },
    };
    let most = match goal {
        Goal::Bytes(most) => most as f64,
        Goal::Kl(most) => most,
    };
    let part = |cost: f64| ((cost / most * PARTS as f64) as usize).min(PARTS);
    let better = |a: State, b: State| (a.value, a.cost) < (b.value, b.cost);

    let least = |choices: &Vec<Choice>| choices.iter().map(|c| of(c).cost).reduce(f64::min);
    let least = matrices.iter().map(least).collect::<Option<Vec<f64>>>()?;
    assert!(matrices.iter().all(|choices| choices.len() <= 256), "more choices than there are types");
    let mut states: Vec<Option<State>> = vec![None; PARTS + 1];
    states[0] = Some(State { cost: 0.0, value: 0.0 });
    let mut steps = Vec::with_capacity(matrices.len());
    for (m, choices) in matrices.iter().enumerate() {
        // A state that leaves too little for the matrices to come must not stand in the way of one that does not.
        let rest: f64 = least[m + 1..].iter().sum();
        let mut next: Vec<Option<State>> = vec![None; PARTS + 1];
        let mut step = vec![(0u16, 0u8); PARTS + 1];
        for (from, state) in states.iter().enumerate() {
            let Some(state) = state else { continue };
            for (i, choice) in choices.iter().enumerate() {
                let c = of(choice);
                let sum = State { cost: state.cost + c.cost, value: state.value + c.value };
                let fits = sum.cost + rest <= most * (1.0 + 1e-12); // and is a number; sums round
                if !fits || !sum.value.is_finite() {
                    continue;
                }
                let to = part(sum.cost);
                if next[to].is_none_or(|there| better(sum, there)) {
                    (next[to], step[to]) = (Some(sum), (from as u16, i as u8));
                }
            }
        }
        states = next;
        steps.push(step);
    }
    let ends = states.iter().enumerate().filter_map(|(at, state)| Some((at, (*state)?)));
    let (mut at, _) = ends.reduce(|best, end| if better(end.1, best.1) { end } else { best })?;
    let mut chosen: Vec<usize> = Vec::with_capacity(matrices.len());
    for step in steps.iter().rev() {
        let (from, i) = step[at];
        chosen.push(i.into());
        at = from.into();
    }
    chosen.reverse();
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(list: &[(u64, f64)]) -> Vec<Choice> {
        list.iter().map(|&(n_bytes, kl)| Choice { ty: GgmlType::Q4K, n_bytes, kl }).collect()
    }

    #[test]
    fn bytes_go_where_they_bring_the_most() {
        let matrices = [choices(&[(10, 4.0), (20, 1.0), (30, 0.0)]), choices(&[(10, 1.0), (20, 0.5)])];
        let at = |bytes| allocate(&matrices, Goal::Bytes(bytes));
        assert_eq!(at(19), None);
        assert_eq!(at(20), Some(vec![0, 0]));
        assert_eq!(at(30), Some(vec![1, 0]));
        assert_eq!(at(40), Some(vec![2, 0]));
        assert_eq!(at(49), Some(vec![2, 0]));
        assert_eq!(at(50), Some(vec![2, 1]));
        assert_eq!(at(1000), Some(vec![2, 1]));
    }

    #[test]
    fn a_divergence_is_reached_with_few_bytes_or_not_at_all() {
        let matrices = [choices(&[(10, 4.0), (20, 1.0)]), choices(&[(10, 1.0), (20, 0.5)])];
        assert_eq!(allocate(&matrices, Goal::Kl(5.0)), Some(vec![0, 0]));
        assert_eq!(allocate(&matrices, Goal::Kl(2.0)), Some(vec![1, 0]));
        assert_eq!(allocate(&matrices, Goal::Kl(1.5)), Some(vec![1, 1]));
        assert_eq!(allocate(&matrices, Goal::Kl(1.4)), None);
        assert_eq!(allocate(&[vec![]], Goal::Bytes(100)), None);
    }

    #[test]
    fn nothing_that_could_be_chosen_is_better() {
        let mut seed = 1u64;
        let mut below = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for _ in 0..20 {
            // Types of 2 to 8 bits, each bit a quarter of the divergence.
            let mut matrix = || {
                let (rows, kl) = (1 + below(50), (1 + below(1000)) as f64 * 1e-4);
                choices(&[2, 3, 4, 5, 6, 8].map(|bits| (rows * bits, kl / f64::powi(4.0, bits as i32 - 2))))
            };
            let matrices: [_; 5] = std::array::from_fn(|_| matrix());
            let of = |chosen: &[usize]| {
                let chosen = matrices.iter().zip(chosen).map(|(choices, &i)| choices[i]);
                chosen.fold((0, 0.0), |(n, kl), c| (n + c.n_bytes, kl + c.kl))
            };
            let all: Vec<(u64, f64)> =
                (0..6usize.pow(5)).map(|n| of(&[1, 6, 36, 216, 1296].map(|place| n / place % 6))).collect();
            for (bytes, kl) in [all[1234], all[4321], all[7000]] {
                let fewest = all.iter().filter(|a| a.1 <= kl).map(|a| a.0).min();
                let got = allocate(&matrices, Goal::Kl(kl)).map(|chosen| of(&chosen));
                assert_eq!(got.map(|(bytes, _)| bytes), fewest, "KL {kl}");
                assert!(got.is_some_and(|got| got.1 <= kl));

                let least = all.iter().filter(|a| a.0 <= bytes).map(|a| a.1).fold(f64::INFINITY, f64::min);
                let got = allocate(&matrices, Goal::Bytes(bytes)).map(|chosen| of(&chosen));
                assert_eq!(got.map(|(_, kl)| kl), Some(least), "{bytes} bytes");
                assert!(got.is_some_and(|got| got.0 <= bytes));
            }
        }
    }

    #[test]
    fn a_better_type_of_the_same_size_costs_nothing() {
        let matrices = [choices(&[(10, 2.0), (10, 1.0)])];
        assert_eq!(allocate(&matrices, Goal::Bytes(10)), Some(vec![1]));
    }
}
