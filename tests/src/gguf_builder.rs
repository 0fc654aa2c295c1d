//! Builds GGUF files field by field, right or wrong. It shares no code with `kestrel_formats::gguf`.
#![allow(missing_docs)] // fields and constructors have the names that the format gives them

use kestrel_formats::arch::{self, HyperParams, Role};

/// A value as it lies in a file: type id and bytes.
#[derive(Clone)]
pub struct Raw {
    pub ty: u32,
    pub bytes: Vec<u8>,
}

impl Raw {
    pub fn new(ty: u32, bytes: &[u8]) -> Self {
        Self { ty, bytes: bytes.to_vec() }
    }

    pub fn u16(x: u16) -> Self {
        Self::new(2, &x.to_le_bytes())
    }

    pub fn u32(x: u32) -> Self {
        Self::new(4, &x.to_le_bytes())
    }

    pub fn i32(x: i32) -> Self {
        Self::new(5, &x.to_le_bytes())
    }

    pub fn f32(x: f32) -> Self {
        Self::new(6, &x.to_le_bytes())
    }

    pub fn bool(x: u8) -> Self {
        Self::new(7, &[x])
    }

    pub fn str(text: &[u8]) -> Self {
        Self::str_of_len(text.len() as u64, text)
    }

    /// A string that claims to have `len` bytes.
    pub fn str_of_len(len: u64, text: &[u8]) -> Self {
        Self::new(8, &[&len.to_le_bytes(), text].concat())
    }

    /// An array that claims to have `len` elements.
    pub fn array(element: u32, len: u64, elements: &[u8]) -> Self {
        Self::new(9, &[&element.to_le_bytes()[..], &len.to_le_bytes(), elements].concat())
    }
}

/// A tensor's entry in the header, and how much data it gets.
#[derive(Clone)]
pub struct RawTensor {
    pub name: Vec<u8>,
    /// What the entry says about the number of dimensions, if it lies.
    pub n_dims: Option<u32>,
    /// ggml's order, fastest first.
    pub ne: Vec<u64>,
    pub ty: u32,
    /// What the entry says about the offset, if it lies.
    pub offset: Option<u64>,
    /// Size that offsets are computed with.
    pub n_bytes: u64,
    /// Data that is written; shorter than `n_bytes` in files that lie.
    pub data: Vec<u8>,
}

impl RawTensor {
    /// An F32 tensor with data. Dimensions in ggml's order.
    pub fn f32(name: &str, ne: &[u64]) -> Self {
        let n: u64 = ne.iter().product();
        let data = (0..n).flat_map(|i| (0.25 + i as f32).to_le_bytes()).collect();
        Self { data, ..Self::without_data(name, ne, 0, 4 * n) }
    }

    /// A tensor of any type and claimed size.
    pub fn without_data(name: &str, ne: &[u64], ty: u32, n_bytes: u64) -> Self {
        Self {
            name: name.as_bytes().to_vec(),
            n_dims: None,
            ne: ne.to_vec(),
            ty,
            offset: None,
            n_bytes,
            data: Vec::new(),
        }
    }
}

/// A file to be. [`GgufBuilder::bytes`] writes what the fields say, whether or not it makes sense.
#[derive(Clone)]
pub struct GgufBuilder {
    pub magic: [u8; 4],
    pub version: u32,
    /// Counts in the header, if they lie.
    pub n_tensors: Option<u64>,
    pub n_kv: Option<u64>,
    pub pairs: Vec<(Vec<u8>, Raw)>,
    pub tensors: Vec<RawTensor>,
    /// What offsets and padding follow.
    pub alignment: u64,
    pub padding_byte: u8,
}

impl Default for GgufBuilder {
    fn default() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_kv: None,
            pairs: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
            padding_byte: 0,
        }
    }
}

fn put_string(out: &mut Vec<u8>, x: &[u8]) {
    out.extend_from_slice(&(x.len() as u64).to_le_bytes());
    out.extend_from_slice(x);
}

impl GgufBuilder {
    pub fn kv(self, key: &str, value: Raw) -> Self {
        self.kv_bytes(key.as_bytes(), value)
    }

    pub fn kv_bytes(mut self, key: &[u8], value: Raw) -> Self {
        self.pairs.push((key.to_vec(), value));
        self
    }

    pub fn tensor(mut self, t: RawTensor) -> Self {
        self.tensors.push(t);
        self
    }

    /// Replaces or adds a pair.
    pub fn set(mut self, key: &str, value: Raw) -> Self {
        match self.pairs.iter_mut().find(|(k, _)| k == key.as_bytes()) {
            Some((_, v)) => *v = value,
            None => self.pairs.push((key.as_bytes().to_vec(), value)),
        }
        self
    }

    /// Takes a pair out, which must be there.
    pub fn unset(mut self, key: &str) -> Self {
        let before = self.pairs.len();
        self.pairs.retain(|(k, _)| k != key.as_bytes());
        assert_eq!(self.pairs.len() + 1, before, "{key}");
        self
    }

    /// Takes a tensor out, which must be there.
    pub fn without(mut self, name: &str) -> Self {
        let before = self.tensors.len();
        self.tensors.retain(|t| t.name != name.as_bytes());
        assert_eq!(self.tensors.len() + 1, before, "{name}");
        self
    }

    /// Replaces a tensor, which must be there.
    pub fn replace(mut self, t: RawTensor) -> Self {
        let at = self.tensors.iter().position(|old| old.name == t.name).expect("the tensor is there");
        self.tensors[at] = t;
        self
    }

    fn pad(&self, out: &mut Vec<u8>) {
        let end = out.len().next_multiple_of(self.alignment as usize);
        out.resize(end, self.padding_byte);
    }

    /// Everything before the tensor data, not padded.
    pub fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&self.n_kv.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            put_string(&mut out, key);
            out.extend_from_slice(&value.ty.to_le_bytes());
            out.extend_from_slice(&value.bytes);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            put_string(&mut out, &t.name);
            out.extend_from_slice(&t.n_dims.unwrap_or(t.ne.len() as u32).to_le_bytes());
            t.ne.iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
            out.extend_from_slice(&t.ty.to_le_bytes());
            out.extend_from_slice(&t.offset.unwrap_or(offset).to_le_bytes());
            offset = offset.wrapping_add(t.n_bytes.wrapping_add(self.alignment - 1) & !(self.alignment - 1));
        }
        out
    }

    /// The whole file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        for t in &self.tensors {
            self.pad(&mut out);
            out.extend_from_slice(&t.data);
        }
        if !self.tensors.is_empty() {
            self.pad(&mut out);
        }
        out
    }
}

impl From<GgufBuilder> for Vec<u8> {
    fn from(file: GgufBuilder) -> Self {
        file.bytes()
    }
}

/// A complete model of architecture `mamba` with these hyperparameters, all F32. Its numbers are such that it runs.
pub fn model(h: &HyperParams) -> GgufBuilder {
    let size = |x: usize| Raw::u32(x as u32);
    let mut out = GgufBuilder::default()
        .kv("general.architecture", Raw::str(b"mamba"))
        .kv("mamba.context_length", Raw::u32(1 << 20))
        .kv("mamba.embedding_length", size(h.d_model))
        .kv("mamba.block_count", size(h.n_layer))
        .kv("mamba.ssm.conv_kernel", size(h.d_conv))
        .kv("mamba.ssm.inner_size", size(h.d_inner))
        .kv("mamba.ssm.state_size", size(h.d_state))
        .kv("mamba.ssm.time_step_rank", size(h.dt_rank))
        .kv("mamba.attention.layer_norm_rms_epsilon", Raw::f32(h.layer_norm_epsilon))
        .kv("mamba.ssm.dt_b_c_rms", Raw::bool(1));
    for (spec, layer) in arch::tensors(h, false) {
        let ne: Vec<u64> = (spec.shape)(h).iter().rev().map(|&d| d as u64).collect();
        let mut tensor = RawTensor::f32(&spec.gguf_name(layer), &ne);
        let spread = |i: usize| ((i * 7919) % 101) as f32 / 50.0 - 1.0;
        let number = |i: usize| match spec.role {
            Role::SsmA => -1.5 - spread(i),
            Role::AttnNorm | Role::OutputNorm => 1.0,
            _ => 0.1 * spread(i),
        };
        tensor.data = (0..tensor.data.len() / 4).flat_map(|i| number(i).to_le_bytes()).collect();
        out.tensors.push(tensor);
    }
    out
}
