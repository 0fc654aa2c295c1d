//! Log-likelihoods of continuations: what EleutherAI's lm-evaluation-harness asks of a model, with its token
//! boundaries. The rules are those of its `HFLM`, so that both score the same tokens.

use crate::evaluate::log_softmax;
use crate::reader::{Reader, Sequence};
use crate::tokenizer::Tokenizer;
use kestrel_formats::{Error, ErrorKind, Result};

/// Tokens whose probabilities are asked for, after others that are only read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scored {
    /// What is read first, at least one token.
    pub context: Vec<u32>,
    /// What is scored, at least one token.
    pub continuation: Vec<u32>,
}

/// How likely a continuation is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likelihood {
    /// Sum of the natural logarithms of the probabilities of its tokens.
    pub log_likelihood: f64,
    /// Whether each of them is the most likely one.
    pub is_greedy: bool,
    /// How many they are.
    pub n_tokens: usize,
}

/// The tokens of a continuation of a context.
///
/// White space at the end of the context belongs to the continuation. Both are encoded together, and what the context
/// alone has tokens for is cut off in front. Nothing before the continuation is `prefix`, the token that begins a text.
/// Special tokens written in the texts count as such. Errors: `Missing` if no token is left to score.
pub fn continuation(tokenizer: &Tokenizer, prefix: u32, context: &str, text: &str) -> Result<Scored> {
    let encode = |text: &str| tokenizer.encode(text, true);
    // Python's str.rstrip, which also strips four control characters.
    let read = context.trim_end_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c));
    let whole = encode(&format!("{context}{text}"))?;
    let (context, continuation) = if context.is_empty() {
        match whole.split_first() {
            Some((&first, rest)) if first == prefix => (vec![first], rest.to_vec()),
            _ => (vec![prefix], whole),
        }
    } else {
        let context = encode(read)?;
        let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
        // A context of white space only is all continuation.
        (if context.is_empty() { vec![prefix] } else { context }, continuation)
    };
    match continuation.is_empty() {
        true => Err(Error::new(ErrorKind::Missing).what("continuation").expected("at least one token")),
        false => Ok(Scored { context, continuation }),
    }
}

/// All tokens of a text in pieces, each scored once: the first after `prefix`, the next ones after as much before them
/// as `n_max` allows beside what they score, at least one token.
///
/// # Panics
/// If `n_max` is zero.
pub fn rolling(tokens: &[u32], prefix: u32, n_max: usize) -> Vec<Scored> {
    assert!(n_max > 0);
    let mut out = Vec::new();
    let mut done = 0;
    while done < tokens.len() {
        let end = (done + n_max).min(tokens.len());
        // A model reads n_max tokens: the scored ones but the last, and before them what is left of these.
        let context = match done {
            0 => vec![prefix],
            _ => tokens[end - n_max - 1..done].to_vec(),
        };
        out.push(Scored { context, continuation: tokens[done..end].to_vec() });
        done = end;
    }
    out
}

impl Scored {
    /// What is read, and where the logits are wanted; of a context that is too long the end, so that at most `n_max`
    /// tokens are read. Errors: `Limit` if the continuation alone is longer.
    fn sequence(&self, n_max: usize) -> Result<Sequence> {
        let n = self.continuation.len();
        if n > n_max {
            return Err(Error::new(ErrorKind::Limit)
                .what("continuation")
                .expected(format!("at most {n_max} tokens"))
                .found(n));
        }
        let all = [&self.context[..], &self.continuation].concat();
        let tokens = all[all.len().saturating_sub(n_max + 1)..all.len() - 1].to_vec();
        Ok(Sequence { wanted: tokens.len() - n..tokens.len(), tokens })
    }
}

/// The likelihood of each, reading at most `n_max` tokens for it. `progress` is called after each forward pass with how
/// many are done, and stops everything with an error of its own.
///
/// Errors: `Limit`, [`Reader::read`]'s.
pub fn likelihoods(
    reader: &mut Reader<'_>,
    asked: &[Scored],
    n_max: usize,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Likelihood>> {
    let sequences = asked.iter().map(|s| s.sequence(n_max)).collect::<Result<Vec<_>>>()?;
    let mut out: Vec<Likelihood> = asked
        .iter()
        .map(|s| Likelihood { log_likelihood: 0.0, is_greedy: true, n_tokens: s.continuation.len() })
        .collect();
    let mut log_probs = Vec::new();
    let mut first = 0;
    while first < sequences.len() {
        let n = reader.together(&sequences[first..]);
        reader.read(&sequences[first..first + n], |i, place, logits| {
            log_probs.resize(logits.len(), 0.0);
            log_softmax(logits, &mut log_probs);
            let i = first + i;
            let token = asked[i].continuation[place - sequences[i].wanted.start];
            let its = log_probs[token as usize];
            out[i].log_likelihood += its;
            // Of equals the first is the most likely one, as torch's argmax has it.
            let better = |(other, &p): (usize, &f64)| p > its || (p == its && other < token as usize);
            out[i].is_greedy &= !log_probs.iter().enumerate().any(better);
            Ok(())
        })?;
        first += n;
        progress(first)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the definition: every token once, each piece preceded by exactly what lies before it, and no more than
    /// `n_max` tokens read.
    #[test]
    fn rolling_windows_cover_every_token_once() {
        for n in 0..20u32 {
            let tokens: Vec<u32> = (1..=n).collect();
            for n_max in 1..25 {
                let pieces = rolling(&tokens, 0, n_max);
                let scored: Vec<u32> = pieces.iter().flat_map(|p| p.continuation.clone()).collect();
                assert_eq!(scored, tokens);
                for p in &pieces {
                    let read: Vec<u32> = [&p.context[..], &p.continuation].concat();
                    assert!(read.windows(2).all(|w| w[1] == w[0] + 1), "{read:?}");
                    assert!(!p.context.is_empty() && read.len() - 1 <= n_max);
                    // A last piece that is short has the longest context that fits.
                    assert!(read.len() - 1 == n_max || p.context[0] == 0);
                    assert_eq!(p.sequence(n_max).unwrap().tokens, read[..read.len() - 1]);
                }
            }
        }
    }

    #[test]
    fn a_long_context_loses_its_beginning() {
        let s = Scored { context: vec![1, 2, 3, 4], continuation: vec![5, 6] };
        let all = s.sequence(100).unwrap();
        assert_eq!((all.tokens, all.wanted), (vec![1, 2, 3, 4, 5], 3..5));
        let cut = s.sequence(3).unwrap();
        assert_eq!((cut.tokens, cut.wanted), (vec![3, 4, 5], 1..3));
        let least = s.sequence(2).unwrap();
        assert_eq!((least.tokens, least.wanted), (vec![4, 5], 0..2));
        assert_eq!(s.sequence(1).unwrap_err().kind(), ErrorKind::Limit);
    }
}
