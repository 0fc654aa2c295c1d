//! Laying out a safetensors file to be written.

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};

/// A tensor of a file to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorDecl {
    /// Name.
    pub name: String,
    /// Type of its numbers.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<u64>,
}

/// Where everything of a file goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// Its first bytes.
    pub header: Vec<u8>,
    /// Offset and size of each tensor, in the order they were given.
    pub tensors: Vec<(u64, u64)>,
    /// Bytes of the whole file.
    pub file_bytes: u64,
}

/// Lays a file out as the library does: wide numbers first and the header padded, so that every number is aligned.
pub fn layout(tensors: &[TensorDecl]) -> Layout {
    let n_bytes = |t: &TensorDecl| {
        let shape = t.shape.iter().map(|&dim| dim as usize).collect();
        let info = TensorInfo { dtype: t.dtype, shape, data_offsets: (0, 0) };
        super::header::tensor_bytes(&info).unwrap_or(u64::MAX)
    };
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| tensors.get(i).map(|t| (std::cmp::Reverse(t.dtype.bitsize()), &t.name)));
    let (mut places, mut end) = (vec![(0, 0); tensors.len()], 0u64);
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    for i in order {
        let (Some(t), Some(place)) = (tensors.get(i), places.get_mut(i)) else { continue };
        *place = (end, n_bytes(t));
        end = end.saturating_add(place.1);
        header.insert(
            t.name.clone(),
            json!({"dtype": t.dtype.to_string(), "shape": t.shape, "data_offsets": [place.0, end]}),
        );
    }
    let mut text = Value::Object(header).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let header = [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    places.iter_mut().for_each(|(offset, _)| *offset = offset.saturating_add(header.len() as u64));
    Layout { file_bytes: end.saturating_add(header.len() as u64), tensors: places, header }
}
