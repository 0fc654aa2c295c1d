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

/// The index of the choice for each matrix. `None` if even the smallest are too large, or the best too far away, or a
/// matrix has no choice.
///
/// Starts from the smallest types and takes, one after the other, the step that brings the most per byte.
pub fn allocate(matrices: &[Vec<Choice>], goal: Goal) -> Option<Vec<usize>> {
    let smallest = |choices: &Vec<Choice>| (0..choices.len()).min_by_key(|&i| choices[i].n_bytes);
    let mut chosen = matrices.iter().map(smallest).collect::<Option<Vec<usize>>>()?;
    let total = |chosen: &[usize]| {
        let chosen = matrices.iter().zip(chosen).map(|(choices, &i)| choices[i]);
        chosen.fold((0, 0.0), |(n_bytes, kl), c| (n_bytes + c.n_bytes, kl + c.kl))
    };
    let (mut n_bytes, mut kl) = total(&chosen);
    loop {
        let left = match goal {
            Goal::Bytes(most) => most.checked_sub(n_bytes)?,
            Goal::Kl(most) if kl <= most => return Some(chosen),
            Goal::Kl(_) => u64::MAX,
        };
        let mut best = None;
        for (m, choices) in matrices.iter().enumerate() {
            let now = choices[chosen[m]];
            for (i, c) in choices.iter().enumerate() {
                let (more, less) = (c.n_bytes.saturating_sub(now.n_bytes), now.kl - c.kl);
                if less <= 0.0 || more > left {
                    continue;
                }
                // More for no byte at all is the best that there is.
                let gain = if more == 0 { f64::INFINITY } else { less / more as f64 };
                if best.is_none_or(|(_, _, most)| gain > most) {
                    best = Some((m, i, gain));
                }
            }
        }
        match (best, goal) {
            (Some((m, i, _)), _) => chosen[m] = i,
            (None, Goal::Bytes(_)) => return Some(chosen),
            (None, Goal::Kl(_)) => return None,
        }
        (n_bytes, kl) = total(&chosen);
    }
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
    fn a_better_type_of_the_same_size_costs_nothing() {
        let matrices = [choices(&[(10, 2.0), (10, 1.0)])];
        assert_eq!(allocate(&matrices, Goal::Bytes(10)), Some(vec![1]));
    }
}
