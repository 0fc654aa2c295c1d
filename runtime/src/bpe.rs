//! Byte pair encoding (Sennrich et al., <https://aclanthology.org/P16-1162/>): a word begins as its characters, and of all
//! neighbours that a merge joins, those of the best merge become one, the leftmost first, until none is left.
//!
//! The ids are those of `BPE` in the crate `tokenizers`, which the tests compare with. That one wants the vocabulary and
//! the merges as strings and looks all of them up again, 90 ms before the first token of a vocabulary of 65,024.

use kestrel_formats::tokenizer::{Merge, TokenizerData};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// The tables of one vocabulary.
pub(crate) struct Bpe {
    /// Ids of the tokens that are one character.
    characters: HashMap<char, u32>,
    /// What two neighbours become.
    merges: HashMap<(u32, u32), Joined>,
}

/// The best is the least: by rank.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Joined {
    /// Place of the merge in the list; of one that is listed twice, the last.
    rank: u32,
    id: u32,
}

/// A part of a word, and the indices of those beside it.
struct Part {
    id: u32,
    before: Option<usize>,
    after: Option<usize>,
}

impl Bpe {
    pub(crate) fn new(data: &TokenizerData) -> Self {
        let character = |(id, token): (u32, &Vec<u8>)| {
            let mut characters = std::str::from_utf8(token).ok()?.chars();
            let first = characters.next()?;
            characters.next().is_none().then_some((first, id))
        };
        let merge = |(rank, m): (u32, &Merge)| ((m.left, m.right), Joined { rank, id: m.joined });
        Self {
            characters: (0..).zip(&data.tokens).filter_map(character).collect(),
            merges: (0..).zip(&data.merges).map(merge).collect(),
        }
    }

    /// The ids of a word. Characters that are no token are left out, as in `tokenizers` without an unknown token.
    pub(crate) fn encode(&self, word: &str) -> Vec<u32> {
        let ids: Vec<u32> = word.chars().filter_map(|c| self.characters.get(&c).copied()).collect();
        let n_parts = ids.len();
        let mut parts: Vec<Part> = (0..n_parts)
            .zip(ids)
            .map(|(i, id)| Part { id, before: i.checked_sub(1), after: Some(i + 1).filter(|n| *n < n_parts) })
            .collect();
        // What may be joined, the best first, by the index of the left part. An entry stays when one of its parts is
        // joined with another one, and is passed over when its turn comes.
        let mut waiting: BinaryHeap<_> =
            (0..n_parts).filter_map(|left| Some(Reverse((self.joined(&parts, left)?, left)))).collect();
        let mut gone = vec![false; n_parts];
        while let Some(Reverse((joined, left))) = waiting.pop() {
            if gone[left] || self.joined(&parts, left).is_none_or(|now| now.id != joined.id) {
                continue;
            }
            let Some(right) = parts[left].after else { continue };
            gone[right] = true;
            parts[left].id = joined.id;
            parts[left].after = parts[right].after;
            if let Some(after) = parts[left].after {
                parts[after].before = Some(left);
            }
            let neighbours = parts[left].before.into_iter().chain([left]);
            waiting.extend(neighbours.filter_map(|i| Some(Reverse((self.joined(&parts, i)?, i)))));
        }
        parts.iter().zip(gone).filter(|(_, gone)| !gone).map(|(part, _)| part.id).collect()
    }

    /// What the part becomes with the one after it.
    fn joined(&self, parts: &[Part], left: usize) -> Option<Joined> {
        let right = parts[left].after?;
        self.merges.get(&(parts[left].id, parts[right].id)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use tokenizers::Model as _;
    use tokenizers::models::bpe::{BPE, Vocab};

    /// The same tables in `tokenizers`.
    fn oracle(data: &TokenizerData) -> BPE {
        let text = |id: u32| String::from_utf8(data.tokens[id as usize].clone()).expect("UTF-8");
        let vocabulary: Vocab = (0..data.tokens.len() as u32).map(|id| (text(id), id)).collect();
        let merges = data.merges.iter().map(|m| (text(m.left), text(m.right))).collect();
        BPE::builder().vocab_and_merges(vocabulary, merges).build().expect("tables")
    }

    /// Words of `characters`, short and long ones.
    fn check(data: &TokenizerData, characters: &[char]) -> usize {
        let (ours, theirs) = (Bpe::new(data), oracle(data));
        let mut state = 7u64;
        let mut next = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let mut n_joined = 0;
        for round in 0..3000 {
            let n = if round % 100 == 0 { 2000 } else { next(12) };
            let word: String = (0..n).map(|_| characters[next(characters.len())]).collect();
            let wanted: Vec<u32> = theirs.tokenize(&word).expect("ids").iter().map(|t| t.id).collect();
            assert_eq!(ours.encode(&word), wanted, "{word:?}");
            n_joined += n - wanted.len();
        }
        n_joined
    }

    #[test]
    fn the_tiny_vocabulary_gives_the_ids_of_tokenizers() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny-falcon-mamba");
        let data = TokenizerData::from_hf(&dir).expect("reads").expect("a tokenizer");
        let letters: Vec<char> = "etaoinsrhldcumfpgwyb".chars().collect();
        assert!(check(&data, &letters) > 10_000);
        // Characters that are no token, among those that are.
        assert!(check(&data, &['t', 'h', 'e', 'Ġ', '字', '\u{3}', ' ']) > 10_000);
    }

    /// Merges whose results overlap, one that is listed twice, and one token that two of them make.
    #[test]
    fn overlaps_and_repeated_merges_give_the_ids_of_tokenizers() {
        let texts = ["a", "b", "aa", "ab", "aaa", "ba", "aab", "abab"];
        let id = |text: &str| texts.iter().position(|t| *t == text).expect("a token") as u32;
        let pairs = [
            ("a", "b"),
            ("a", "a"),
            ("a", "ab"),
            ("aa", "a"),
            ("aa", "b"),
            ("a", "b"),
            ("ab", "ab"),
            ("b", "a"),
        ];
        let merge =
            |(l, r): &(&str, &str)| Merge { left: id(l), right: id(r), joined: id(&format!("{l}{r}")) };
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny-falcon-mamba");
        let mut data = TokenizerData::from_hf(&dir).expect("reads").expect("a tokenizer");
        data.tokens = texts.iter().map(|t| t.as_bytes().to_vec()).collect();
        for turn in 0..pairs.len() {
            data.merges = pairs.iter().cycle().skip(turn).take(pairs.len()).map(merge).collect();
            assert!(check(&data, &['a', 'b', 'b', 'a', 'a', 'c']) > 10_000);
        }
    }
}
