//! Safetensors files for tests, read and written without the product's reader.

use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// As the header spells it.
    pub dtype: String,
    /// As in the header.
    pub shape: Vec<u64>,
    /// The data.
    pub bytes: Vec<u8>,
}

impl Stored {
    /// The data as f32.
    pub fn f32s(&self) -> Vec<f32> {
        assert_eq!(self.dtype, "F32");
        self.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Stored>;

/// Everything in a file.
pub fn read(path: &Path) -> Tensors {
    let file = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let n = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + n]).expect("a header");
    let number = |v: &Value| v.as_u64().expect("a number");
    let stored = |info: &Value| {
        let [begin, end] = [0, 1].map(|i| 8 + n + number(&info["data_offsets"][i]) as usize);
        Stored {
            dtype: info["dtype"].as_str().expect("a dtype").to_owned(),
            shape: info["shape"].as_array().expect("a shape").iter().map(number).collect(),
            bytes: file[begin..end].to_vec(),
        }
    };
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
    tensors.map(|(name, info)| (name.clone(), stored(info))).collect()
}

/// The bytes of a file with these tensors; wider numbers first, so that all are aligned.
pub fn to_bytes(tensors: &Tensors) -> Vec<u8> {
    let width = |t: &Stored| match t.dtype.as_str() {
        "F32" => 4,
        "F16" | "BF16" => 2,
        _ => 1,
    };
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, t)| std::cmp::Reverse(width(t)));
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, t) in order {
        let begin = data.len();
        data.extend(&t.bytes);
        let info = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, data.len()]});
        header.insert(name.clone(), info);
    }
    let mut text = Value::Object(header).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat()
}
