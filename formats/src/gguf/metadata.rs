//! The parsed key-value pairs. Text and arrays stay where the file is mapped.

use super::cursor::{Cursor, Extent};
use super::value::{Array, Strings, Value, ValueType};
use crate::limits::{GGUF_KEY_BYTES_MAX, GGUF_KV_MAX};
use crate::map::Map;
use crate::{Error, ErrorKind, Result};

/// A key and the place of its value: 24 bytes, where the shortest pair in a file takes 14.
struct Entry {
    key_start: u32,
    key_len: u16,
    value: Extent,
}

/// The metadata of one file, in file order, found by binary search.
pub struct Metadata {
    map: Map,
    entries: Vec<Entry>,
    /// Indices of `entries`, sorted by key. A search in it has no bad case, unlike a hash table.
    by_key: Vec<u32>,
}

/// Least bytes of a pair: key length, one byte of key, type, one byte of value.
const PAIR_BYTES_MIN: usize = 8 + 1 + 4 + 1;

impl Metadata {
    /// Reads `n_kv` pairs. `n_kv` was bounded by the size of the file.
    pub(super) fn read(map: &Map, cursor: &mut Cursor, n_kv: usize) -> Result<Self> {
        let mut out = Self { map: map.clone(), entries: Vec::with_capacity(n_kv), by_key: Vec::new() };
        for i in 0..n_kv {
            let at = cursor.pos() as u64;
            let (key_start, key) =
                cursor.string("a key's length").map_err(|e| e.what(format!("key {i} of {n_kv}")))?;
            let key = check_key(key).map_err(|e| e.at(at).what(format!("key {i} of {n_kv}")))?;
            let value = cursor
                .value_type()
                .and_then(|ty| cursor.value(ty))
                .map_err(|e| e.what(format!("key \"{key}\"")))?;
            // The key's length was checked to fit, and the cursor's positions fit in 32 bits.
            out.entries.push(Entry { key_start: key_start as u32, key_len: key.len() as u16, value });
        }
        let mut by_key: Vec<u32> = (0..n_kv as u32).collect();
        by_key.sort_unstable_by_key(|&i| (out.key_at(i), i));
        out.by_key = by_key;
        out.check_duplicates()?;
        Ok(out)
    }

    /// The count in the header.
    pub(super) fn read_count(cursor: &mut Cursor) -> Result<usize> {
        let at = cursor.pos() as u64;
        let n = cursor.count(PAIR_BYTES_MIN, "a number of key-value pairs")?;
        if n as u64 > GGUF_KV_MAX {
            return Err(Error::new(ErrorKind::Limit)
                .at(at)
                .expected(format!("at most {GGUF_KV_MAX} key-value pairs"))
                .found(n));
        }
        Ok(n)
    }

    fn check_duplicates(&self) -> Result<()> {
        for pair in self.by_key.windows(2) {
            if let &[a, b] = pair
                && self.key_at(a) == self.key_at(b)
            {
                return Err(Error::new(ErrorKind::Duplicate)
                    .at(self.offset_of_key(b))
                    .what(format!("key \"{}\"", self.key_at(a)))
                    .expected("each key once")
                    .found(format!("the same key at byte {}", self.offset_of_key(a))));
            }
        }
        Ok(())
    }

    /// Offset of the key's length field.
    fn offset_of_key(&self, i: u32) -> u64 {
        self.entries.get(i as usize).map_or(0, |e| u64::from(e.key_start) - 8)
    }

    fn bytes(&self, start: u32, len: usize) -> &[u8] {
        self.map.get(start as usize..).and_then(|rest| rest.get(..len)).unwrap_or_default()
    }

    fn key_of(&self, e: &Entry) -> &str {
        std::str::from_utf8(self.bytes(e.key_start, e.key_len.into())).unwrap_or_default()
    }

    fn key_at(&self, i: u32) -> &str {
        self.entries.get(i as usize).map_or("", |e| self.key_of(e))
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All pairs in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Field<'_>)> {
        self.entries.iter().map(|e| (self.key_of(e), Field { metadata: self, value: e.value }))
    }

    /// Whether the key is there, with whatever type.
    pub fn contains(&self, key: &str) -> bool {
        self.field(key).is_some()
    }

    /// The value of a key, with whatever type.
    pub fn field(&self, key: &str) -> Option<Field<'_>> {
        let found = self.by_key.binary_search_by(|&i| self.key_at(i).cmp(key)).ok()?;
        let entry = self.entries.get(*self.by_key.get(found)? as usize)?;
        Some(Field { metadata: self, value: entry.value })
    }

    /// The error of a getter: names file, key and offset.
    fn error(&self, kind: ErrorKind, key: &str, field: &Field) -> Error {
        Error::new(kind).file(self.map.path()).what(format!("key \"{key}\"")).at(field.offset())
    }

    /// The field, if it is there, which must have type `ty`.
    fn typed(&self, key: &str, ty: ValueType) -> Result<Option<Field<'_>>> {
        match self.field(key) {
            Some(f) if f.value.ty != ty => {
                Err(self.error(ErrorKind::WrongType, key, &f).expected(ty).found(f.type_name()))
            }
            f => Ok(f),
        }
    }

    /// The array, if it is there, which must have elements of type `element`.
    fn typed_array(&self, key: &str, element: ValueType) -> Result<Option<Field<'_>>> {
        match self.field(key) {
            Some(f) if f.value.ty != ValueType::Array || f.value.element != element => Err(self
                .error(ErrorKind::WrongType, key, &f)
                .expected(format!("array of {element}"))
                .found(f.type_name())),
            f => Ok(f),
        }
    }

    fn integer<T: TryFrom<i128>>(&self, key: &str, expected: &str) -> Result<Option<T>> {
        let Some(field) = self.field(key) else { return Ok(None) };
        let x = match field.value() {
            Value::U8(x) => x.into(),
            Value::I8(x) => x.into(),
            Value::U16(x) => x.into(),
            Value::I16(x) => x.into(),
            Value::U32(x) => x.into(),
            Value::I32(x) => x.into(),
            Value::U64(x) => x.into(),
            Value::I64(x) => i128::from(x),
            _ => {
                return Err(self
                    .error(ErrorKind::WrongType, key, &field)
                    .expected(expected)
                    .found(field.type_name()));
            }
        };
        T::try_from(x).map(Some).map_err(|_| {
            self.error(ErrorKind::OutOfRange, key, &field)
                .expected(format!("a value that fits {expected}"))
                .found(x)
        })
    }

    /// An integer of any width and sign that fits; `WrongType` or `OutOfRange` otherwise, `None` if absent.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.integer(key, "u64")
    }

    /// As [`Self::u64`].
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.integer(key, "u32")
    }

    /// As [`Self::u64`].
    pub fn i32(&self, key: &str) -> Result<Option<i32>> {
        self.integer(key, "i32")
    }

    /// An f32; `WrongType` if it is something else.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        Ok(self.typed(key, ValueType::F32)?.and_then(|f| match f.value() {
            Value::F32(x) => Some(x),
            _ => None,
        }))
    }

    /// A bool; `WrongType` if it is something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        Ok(self.typed(key, ValueType::Bool)?.map(|f| f.bytes() == [1]))
    }

    /// A string, borrowed from the map; `WrongType` if it is something else.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        Ok(self.typed(key, ValueType::String)?.map(|f| f.as_str().unwrap_or_default()))
    }

    /// An array of strings, borrowed from the map.
    pub fn strings(&self, key: &str) -> Result<Option<StringArray<'_>>> {
        Ok(self
            .typed_array(key, ValueType::String)?
            .map(|f| StringArray::new(f.bytes(), f.value.count as usize)))
    }

    /// An array of i32, of exactly that element type, as llama.cpp asks for.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        Ok(self.typed_array(key, ValueType::I32)?.and_then(|f| match f.value() {
            Value::Array(Array::I32(x)) => Some(x),
            _ => None,
        }))
    }

    /// As [`Self::i32s`].
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        Ok(self.typed_array(key, ValueType::U32)?.and_then(|f| match f.value() {
            Value::Array(Array::U32(x)) => Some(x),
            _ => None,
        }))
    }

    /// As [`Self::i32s`].
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        Ok(self.typed_array(key, ValueType::F32)?.and_then(|f| match f.value() {
            Value::Array(Array::F32(x)) => Some(x),
            _ => None,
        }))
    }

    /// Everything, owned, in file order.
    pub fn to_pairs(&self) -> Vec<(String, Value)> {
        self.iter().map(|(key, field)| (key.to_owned(), field.value())).collect()
    }
}

/// One value where it lies.
#[derive(Clone, Copy)]
pub struct Field<'a> {
    metadata: &'a Metadata,
    value: Extent,
}

impl<'a> Field<'a> {
    /// Type of the value.
    pub fn value_type(&self) -> ValueType {
        self.value.ty
    }

    /// Element type and number of elements, if it is an array.
    pub fn array(&self) -> Option<(ValueType, usize)> {
        (self.value.ty == ValueType::Array).then_some((self.value.element, self.value.count as usize))
    }

    /// Offset of its first byte in the file (of an array's first element, of a text's first letter).
    pub fn offset(&self) -> u64 {
        self.value.start.into()
    }

    /// The text, if it is a string.
    pub fn as_str(&self) -> Option<&'a str> {
        (self.value.ty == ValueType::String).then(|| std::str::from_utf8(self.bytes()).unwrap_or_default())
    }

    /// The value, owned.
    pub fn value(&self) -> Value {
        self.head(usize::MAX)
    }

    /// The value, owned, an array cut to its first `n` elements.
    pub fn head(&self, n: usize) -> Value {
        Value::decode_scalar(self.value.ty, self.bytes())
            .unwrap_or_else(|| Value::Array(Array::decode(self.value.element, self.bytes(), n)))
    }

    fn bytes(&self) -> &'a [u8] {
        self.metadata.bytes(self.value.start, self.value.n_bytes as usize)
    }

    fn type_name(&self) -> String {
        match self.array() {
            Some((element, _)) => format!("array of {element}"),
            None => self.value.ty.to_string(),
        }
    }
}

/// An array of strings in the map, with a table of where each starts.
pub struct StringArray<'a> {
    bytes: &'a [u8],
    /// Offset in `bytes` of each string's length field, and the end of the last.
    starts: Vec<u32>,
}

impl<'a> StringArray<'a> {
    fn new(bytes: &'a [u8], count: usize) -> Self {
        let mut starts = Vec::with_capacity(count.saturating_add(1));
        let mut end = 0u32;
        starts.push(end);
        starts.extend(Strings { rest: bytes }.take(count).map(|s| {
            end += 8 + s.len() as u32; // all of them lie in metadata, whose size fits
            end
        }));
        Self { bytes, starts }
    }

    /// Number of strings.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// String `i`, as bytes: a token need not be UTF-8.
    pub fn get(&self, i: usize) -> Option<&'a [u8]> {
        let (start, end) = (*self.starts.get(i)?, *self.starts.get(i.checked_add(1)?)?);
        self.bytes.get(start as usize + 8..end as usize)
    }

    /// All strings in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        Strings { rest: self.bytes }.take(self.len())
    }
}

/// A key is 1 to 65535 bytes of UTF-8 without NUL.
pub(super) fn check_key(key: &[u8]) -> Result<&str> {
    let bad = |found: String| {
        Err(Error::new(ErrorKind::BadName)
            .expected(format!("a key of 1 to {GGUF_KEY_BYTES_MAX} bytes of UTF-8 without NUL"))
            .found(found))
    };
    match std::str::from_utf8(key) {
        _ if key.is_empty() => bad("an empty key".to_owned()),
        _ if key.len() as u64 > GGUF_KEY_BYTES_MAX => bad(format!("{} bytes", key.len())),
        Err(_) => bad("other bytes".to_owned()),
        Ok(text) if text.contains('\0') => bad("a NUL".to_owned()),
        Ok(text) => Ok(text),
    }
}
