//! Metadata values: their types on disk, the owned form, and their encoding.

use crate::{Error, ErrorKind, Result};

/// Type of a metadata value. The discriminants are the ids in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // named after the GGUF specification's types
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type with this id; `UnknownType` for an id that the format does not define.
    pub(super) fn from_id(id: u32) -> Result<Self> {
        Self::ALL.get(id as usize).copied().ok_or_else(|| {
            Error::new(ErrorKind::UnknownType)
                .expected("a value type from 0 to 12")
                .found(format!("type {id}"))
        })
    }

    /// Bytes of one value; of a string or an array the least, which is its length field (and element type).
    pub(super) fn min_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::String | Self::U64 | Self::I64 | Self::F64 => 8,
            Self::Array => 12,
        }
    }
}

impl std::fmt::Display for ValueType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

/// A metadata value, owned. `Value::from` takes every Rust type that a variant holds.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    Str(String),
    Array(Array),
}

/// An array value. Arrays of arrays exist in the format and are refused here: no model file has one.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    /// Bytes, because a token need not be UTF-8.
    Strings(Vec<Vec<u8>>),
}

/// What every number type does alike: conversion into a value, decoding of an array, encoding of both.
macro_rules! numbers {
    ($($variant:ident $type:ty),*) => {
        $(
            impl From<$type> for Value {
                fn from(x: $type) -> Self {
                    Self::$variant(x)
                }
            }
            impl From<Vec<$type>> for Value {
                fn from(x: Vec<$type>) -> Self {
                    Self::Array(Array::$variant(x))
                }
            }
        )*

        impl Value {
            /// The type on disk.
            pub fn value_type(&self) -> ValueType {
                match self {
                    $(Self::$variant(_) => ValueType::$variant,)*
                    Self::Bool(_) => ValueType::Bool,
                    Self::Str(_) => ValueType::String,
                    Self::Array(_) => ValueType::Array,
                }
            }

            /// Appends the value as it stands in a file, after its type id.
            pub(super) fn encode(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$variant(x) => out.extend_from_slice(&x.to_le_bytes()),)*
                    Self::Bool(x) => out.push(u8::from(*x)),
                    Self::Str(x) => encode_string(x.as_bytes(), out),
                    Self::Array(x) => x.encode(out),
                }
            }

            /// A scalar from exactly its bytes; `None` for an array, or if the bytes are not such a value.
            pub(super) fn decode_scalar(ty: ValueType, bytes: &[u8]) -> Option<Self> {
                Some(match ty {
                    $(ValueType::$variant => Self::$variant(<$type>::from_le_bytes(bytes.try_into().ok()?)),)*
                    ValueType::Bool => Self::Bool(bytes.first()? != &0),
                    ValueType::String => Self::Str(std::str::from_utf8(bytes).ok()?.to_owned()),
                    ValueType::Array => return None,
                })
            }
        }

        impl Array {
            /// The type of the elements.
            pub fn element_type(&self) -> ValueType {
                match self {
                    $(Self::$variant(_) => ValueType::$variant,)*
                    Self::Bool(_) => ValueType::Bool,
                    Self::Strings(_) => ValueType::String,
                }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Self::$variant(x) => x.len(),)*
                    Self::Bool(x) => x.len(),
                    Self::Strings(x) => x.len(),
                }
            }

            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&(self.element_type() as u32).to_le_bytes());
                out.extend_from_slice(&(self.len() as u64).to_le_bytes());
                match self {
                    $(Self::$variant(x) => x.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),)*
                    Self::Bool(x) => out.extend(x.iter().map(|&x| u8::from(x))),
                    Self::Strings(x) => x.iter().for_each(|x| encode_string(x, out)),
                }
            }

            /// The first `n` elements (all, if there are fewer) of an array whose elements lie in `bytes`.
            pub(super) fn decode(element: ValueType, bytes: &[u8], n: usize) -> Self {
                match element {
                    $(ValueType::$variant => Self::$variant(
                        bytes
                            .chunks_exact(size_of::<$type>())
                            .take(n)
                            .filter_map(|b| b.try_into().ok().map(<$type>::from_le_bytes))
                            .collect(),
                    ),)*
                    ValueType::Bool => Self::Bool(bytes.iter().take(n).map(|&b| b != 0).collect()),
                    ValueType::String | ValueType::Array => {
                        Self::Strings(Strings { rest: bytes }.take(n).map(<[u8]>::to_vec).collect())
                    }
                }
            }
        }
    };
}

numbers!(U8 u8, I8 i8, U16 u16, I16 i16, U32 u32, I32 i32, U64 u64, I64 i64, F32 f32, F64 f64);

impl Array {
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl From<bool> for Value {
    fn from(x: bool) -> Self {
        Self::Bool(x)
    }
}

impl From<&str> for Value {
    fn from(x: &str) -> Self {
        Self::Str(x.to_owned())
    }
}

impl From<String> for Value {
    fn from(x: String) -> Self {
        Self::Str(x)
    }
}

impl From<Vec<bool>> for Value {
    fn from(x: Vec<bool>) -> Self {
        Self::Array(Array::Bool(x))
    }
}

impl From<Vec<Vec<u8>>> for Value {
    fn from(x: Vec<Vec<u8>>) -> Self {
        Self::Array(Array::Strings(x))
    }
}

impl From<Vec<String>> for Value {
    fn from(x: Vec<String>) -> Self {
        Self::Array(Array::Strings(x.into_iter().map(String::into_bytes).collect()))
    }
}

/// Appends a length and the bytes, as keys, names and string values are stored.
pub(super) fn encode_string(x: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(x.len() as u64).to_le_bytes());
    out.extend_from_slice(x);
}

/// Walks length-prefixed strings; ends at the first that is not whole.
pub(super) struct Strings<'a> {
    pub rest: &'a [u8],
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (len, rest) = self.rest.split_first_chunk()?;
        let (string, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.rest = rest;
        Some(string)
    }
}
