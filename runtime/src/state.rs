//! What a sequence remembers: the convolution's last inputs and the scan's state. 38 MiB for the 7B, whatever the
//! length of the text. Cloning a state is a snapshot or a fork; assigning it back restores it.

use crate::kernels::{LANES, LayerBlocks};
use kestrel_formats::arch::{Arch, HyperParams};
use kestrel_formats::{Error, ErrorKind, Result};
use std::path::Path;

/// The state of one sequence. The layout is the same on every instruction set, so a saved state loads anywhere.
#[derive(Clone)]
pub struct State {
    shape: StateShape,
    /// Tokens consumed so far.
    n_tokens: u64,
    /// Per layer (channels / 16, d_conv - 1, 16): the last inputs of each channel, oldest first.
    conv: LayerBlocks,
    /// Per layer (channels / 16, d_state, 16): the scan's h.
    ssm: LayerBlocks,
}

/// The shape of a state, and the model that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateShape {
    n_layer: u32,
    d_inner: u32,
    d_state: u32,
    d_conv: u32,
    falcon: u32,
    /// [`crate::Model::fingerprint`]: equal for all quantizations of the same weights.
    model: u64,
}

impl StateShape {
    /// The shape for a model.
    pub fn new(h: &HyperParams, fingerprint: u64) -> Self {
        Self {
            n_layer: h.n_layer as u32,
            d_inner: h.d_inner as u32,
            d_state: h.d_state as u32,
            d_conv: h.d_conv as u32,
            falcon: u32::from(h.arch == Arch::FalconMamba),
            model: fingerprint,
        }
    }

    fn channels(&self) -> usize {
        (self.d_inner as usize).next_multiple_of(LANES)
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        (self.shape, self.n_tokens) == (other.shape, other.n_tokens)
            && self.conv[..] == other.conv[..]
            && self.ssm[..] == other.ssm[..]
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("shape", &self.shape)
            .field("n_tokens", &self.n_tokens)
            .finish_non_exhaustive()
    }
}

/// Magic and version of a saved state.
const MAGIC: &[u8; 8] = b"KESTRELS";
const VERSION: u32 = 1;
/// magic 8, version 4, n_layer 4, d_inner 4, d_state 4, d_conv 4, falcon 4, model 8, n_tokens 8, checksum 8
const HEADER_BYTES: usize = 56;

impl State {
    /// An empty state: zeros, as before the first token.
    pub fn new(shape: StateShape) -> Self {
        let blocks = shape.channels() / LANES;
        let numbers = |per_channel: u32| {
            LayerBlocks::zeroed(shape.n_layer as usize, blocks, per_channel as usize * LANES)
        };
        Self { shape, n_tokens: 0, conv: numbers(shape.d_conv - 1), ssm: numbers(shape.d_state) }
    }

    /// Back to before the first token.
    pub fn reset(&mut self) {
        self.n_tokens = 0;
        self.conv.fill(0.0);
        self.ssm.fill(0.0);
    }

    /// Tokens consumed so far.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// What the state fits to.
    pub fn shape(&self) -> &StateShape {
        &self.shape
    }

    /// Bytes held in memory.
    pub fn n_bytes(&self) -> usize {
        4 * (self.conv.len() + self.ssm.len())
    }

    pub(crate) fn advance(&mut self, n_tokens: usize) {
        self.n_tokens += n_tokens as u64;
    }

    /// The last inputs of each channel, oldest first: per block of 16 channels (d_conv - 1, 16).
    pub(crate) fn conv(&self) -> &LayerBlocks {
        &self.conv
    }

    /// The scan's h: per block of 16 channels (d_state, 16).
    pub(crate) fn ssm(&self) -> &LayerBlocks {
        &self.ssm
    }

    /// Bytes of a saved state, header included.
    pub fn file_bytes(&self) -> u64 {
        (HEADER_BYTES + self.n_bytes()) as u64
    }

    /// The state as bytes for a file: a header with shape, model, length and checksum, then conv and ssm as
    /// little-endian f32.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(self.n_bytes());
        payload.extend(self.conv.iter().chain(self.ssm.iter()).flat_map(|x| x.to_le_bytes()));
        let s = &self.shape;
        let mut out = Vec::with_capacity(HEADER_BYTES + payload.len());
        out.extend(MAGIC);
        for field in [VERSION, s.n_layer, s.d_inner, s.d_state, s.d_conv, s.falcon] {
            out.extend(field.to_le_bytes());
        }
        for field in [s.model, self.n_tokens] {
            out.extend(field.to_le_bytes());
        }
        let sum = file_checksum(&out, &payload);
        out.extend(sum.to_le_bytes());
        out.extend(payload);
        out
    }

    /// Reads what [`Self::to_bytes`] wrote, for a model of `shape`. `path` names the file in errors.
    pub fn from_bytes(bytes: &[u8], shape: StateShape, path: &Path) -> Result<Self> {
        let err = |kind| Error::new(kind).file(path);
        let header = bytes.get(..HEADER_BYTES).ok_or_else(|| {
            err(ErrorKind::Truncated).at(bytes.len() as u64).expected("a state header of 56 bytes")
        })?;
        if &header[..8] != MAGIC {
            return Err(err(ErrorKind::BadMagic).at(0).expected("a Kestrel state file"));
        }
        let u32_at = |i: usize| u32::from_le_bytes(header[i..i + 4].try_into().unwrap_or_default());
        let u64_at = |i: usize| u64::from_le_bytes(header[i..i + 8].try_into().unwrap_or_default());
        if u32_at(8) != VERSION {
            return Err(err(ErrorKind::UnsupportedVersion).at(8).expected(VERSION).found(u32_at(8)));
        }
        let found = StateShape {
            n_layer: u32_at(12),
            d_inner: u32_at(16),
            d_state: u32_at(20),
            d_conv: u32_at(24),
            falcon: u32_at(28),
            model: u64_at(32),
        };
        if found != shape {
            return Err(err(ErrorKind::Inconsistent)
                .at(12)
                .what("the model that the state belongs to")
                .expected(format!("{shape:?}"))
                .found(format!("{found:?}")));
        }
        let mut state = Self::new(shape); // the size comes from the model, not from the file
        state.n_tokens = u64_at(40);
        let payload = &bytes[HEADER_BYTES..];
        if payload.len() != state.n_bytes() {
            return Err(err(ErrorKind::Truncated)
                .at(bytes.len() as u64)
                .expected(format!("{} bytes of state", state.n_bytes()))
                .found(format!("{} bytes", payload.len())));
        }
        if file_checksum(&header[..48], payload) != u64_at(48) {
            return Err(err(ErrorKind::Inconsistent)
                .at(48)
                .what("checksum")
                .expected("that of the file's bytes"));
        }
        let numbers = payload.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        for (to, from) in state.conv.iter_mut().chain(state.ssm.iter_mut()).zip(numbers) {
            *to = from;
        }
        Ok(state)
    }
}

fn file_checksum(header: &[u8], payload: &[u8]) -> u64 {
    checksum(header).rotate_left(1) ^ checksum(payload)
}

/// FNV-1a over 8-byte words, the rest bytewise: finds damage, not malice (a state is only numbers).
pub fn checksum(bytes: &[u8]) -> u64 {
    let mix = |h: u64, x: u64| (h ^ x).wrapping_mul(0x0000_0100_0000_01b3);
    let words = bytes.chunks_exact(8);
    let tail = words.remainder();
    let h = words
        .fold(0xcbf2_9ce4_8422_2325, |h, w| mix(h, u64::from_le_bytes(w.try_into().unwrap_or_default())));
    tail.iter().fold(h, |h, &b| mix(h, u64::from(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> StateShape {
        StateShape { n_layer: 2, d_inner: 24, d_state: 3, d_conv: 4, falcon: 1, model: 77 }
    }

    fn filled() -> State {
        let mut s = State::new(shape());
        s.conv.iter_mut().chain(s.ssm.iter_mut()).enumerate().for_each(|(i, x)| *x = (i as f32).sin());
        s.n_tokens = 5;
        s
    }

    fn load(bytes: &[u8]) -> Result<State> {
        State::from_bytes(bytes, shape(), Path::new("x.state"))
    }

    #[test]
    fn saving_and_loading_changes_no_bit() {
        let s = filled();
        assert!(load(&s.to_bytes()).unwrap() == s);
        assert_eq!(s.to_bytes().len() as u64, s.file_bytes());
    }

    #[test]
    fn damage_is_found_wherever_it_is() {
        let good = filled().to_bytes();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x10;
            assert!(load(&bad).is_err(), "byte {i}");
        }
        for len in 0..good.len() {
            assert!(load(&good[..len]).is_err(), "{len} bytes");
        }
        assert_eq!(load(b"").unwrap_err().kind(), ErrorKind::Truncated);
        assert_eq!(load(&[good, vec![0]].concat()).unwrap_err().kind(), ErrorKind::Truncated);
    }

    #[test]
    fn a_state_of_another_model_is_refused() {
        let other = StateShape { model: 78, ..shape() };
        let e = State::from_bytes(&filled().to_bytes(), other, Path::new("x.state"));
        assert_eq!(e.err().unwrap().kind(), ErrorKind::Inconsistent);
    }
}
