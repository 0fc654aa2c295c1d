//! Strict JSON: duplicate keys, deep nesting and structural errors become typed errors with a byte offset.
//!
//! serde's own errors are text. A visitor that knows better leaves its [`Error`] in a [`Fault`] before it stops the
//! parser, and [`Fault::finish`] prefers that error to the parser's.

use crate::limits::{JSON_DEPTH_MAX, JSON_HEAP_BYTES};
use crate::{Error, ErrorKind, Result};
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::path::Path;

/// Where a visitor leaves its error, and what values may still take of memory.
#[derive(Default)]
pub(crate) struct Fault {
    error: RefCell<Option<Error>>,
    heap_left: Cell<u64>,
    /// A field of the outermost object that nobody asks for, and that is not kept.
    unused: Option<&'static str>,
}

impl Fault {
    /// Keeps the first `error` and gives the parser something to stop with.
    pub(crate) fn raise<E: de::Error>(&self, error: Error) -> E {
        self.error.borrow_mut().get_or_insert(error);
        E::custom("stopped")
    }

    /// Accounts for so many bytes of a [`Value`]: `[1,1,…]` takes thirty times its text, `[{"a":1},…]` ninety times.
    fn spend<E: de::Error>(&self, n_bytes: usize) -> std::result::Result<(), E> {
        let left = self.heap_left.get().checked_sub(n_bytes as u64).ok_or_else(|| {
            self.raise::<E>(
                Error::new(ErrorKind::Limit)
                    .what("JSON")
                    .expected(format!(
                        "values that fit the text's size and {JSON_HEAP_BYTES} bytes of memory"
                    ))
                    .found("more"),
            )
        })?;
        self.heap_left.set(left);
        Ok(())
    }

    /// Deserializes the whole of `bytes`, a JSON text that starts at `base` in `path`.
    pub(crate) fn parse<'de, S: DeserializeSeed<'de>>(
        &self,
        bytes: &'de [u8],
        path: &Path,
        base: u64,
        seed: S,
    ) -> Result<S::Value> {
        self.heap_left.set(JSON_HEAP_BYTES.saturating_add(bytes.len() as u64));
        let mut parser = serde_json::Deserializer::from_slice(bytes);
        let result = seed.deserialize(&mut parser).and_then(|value| parser.end().map(|()| value));
        result.map_err(|e| {
            let offset = base.saturating_add(byte_offset(bytes, &e));
            match self.error.take() {
                Some(error) => error.file(path).at(offset),
                None => Error::new(ErrorKind::BadJson).file(path).at(offset).expected("valid JSON").found(e),
            }
        })
    }
}

/// serde_json tells line and column, both counted from 1.
fn byte_offset(bytes: &[u8], error: &serde_json::Error) -> u64 {
    let line_start = match error.line() {
        0 | 1 => 0,
        line => {
            bytes.iter().enumerate().filter(|(_, b)| **b == b'\n').nth(line - 2).map_or(0, |(i, _)| i + 1)
        }
    };
    (line_start + error.column().saturating_sub(1)).min(bytes.len()) as u64
}

/// Parses a whole file's JSON, an object. Duplicate keys anywhere, nesting deeper than 64 and values that take much more
/// memory than their text are refused.
pub(crate) fn parse_object(bytes: &[u8], path: &Path) -> Result<Map<String, Value>> {
    object(&Fault::default(), bytes, path)
}

/// As [`parse_object`], without a field that nobody asks for and that may be large.
pub(crate) fn parse_object_without(
    unused: &'static str,
    bytes: &[u8],
    path: &Path,
) -> Result<Map<String, Value>> {
    object(&Fault { unused: Some(unused), ..Fault::default() }, bytes, path)
}

fn object(fault: &Fault, bytes: &[u8], path: &Path) -> Result<Map<String, Value>> {
    match fault.parse(bytes, path, 0, Strict { fault, depth: 0 })? {
        Value::Object(map) => Ok(map),
        other => {
            Err(Error::new(ErrorKind::BadJson).file(path).expected("a JSON object").found(describe(&other)))
        }
    }
}

/// A short name of a value for messages: its type, and the value itself if it is a short scalar.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(x) => x.to_string(),
        Value::Number(x) => x.to_string(),
        Value::String(x) => format!("\"{}\"", shorten(x)),
        Value::Array(x) => format!("an array of {}", x.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// Text from a file as it may stand in a message: printable and at most 80 characters.
pub(crate) fn shorten(text: &str) -> String {
    let mut out: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    if text.chars().nth(80).is_some() {
        out.push('…');
    }
    out
}

/// What an object takes with its first entry: a hash table, and room for four entries.
const OBJECT_BYTES: usize = 64 + 4 * size_of::<(u64, String, Value)>();
/// What an entry takes at most beside its key's text, while the object moves to a place twice as large.
const ENTRY_BYTES: usize = 3 * size_of::<(u64, String, Value)>() + 32;
/// What an element takes at most, while a vector moves to one twice as large.
const ELEMENT_BYTES: usize = 3 * size_of::<Value>();

/// What a text takes, and the smallest piece of memory that an allocator hands out.
fn text_bytes(text: &str) -> usize {
    text.len().max(24)
}

/// Builds a [`Value`] and refuses duplicate keys and deep nesting.
#[derive(Clone, Copy)]
pub(crate) struct Strict<'a> {
    pub(crate) fault: &'a Fault,
    /// How deep the value stands.
    pub(crate) depth: usize,
}

impl Strict<'_> {
    fn deeper<E: de::Error>(self) -> std::result::Result<Self, E> {
        if self.depth >= JSON_DEPTH_MAX {
            return Err(self.fault.raise(
                Error::new(ErrorKind::Limit)
                    .what("JSON nesting")
                    .expected(format!("at most {JSON_DEPTH_MAX} levels")),
            ));
        }
        Ok(Self { depth: self.depth + 1, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, x: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(x))
    }

    fn visit_u64<E>(self, x: u64) -> std::result::Result<Value, E> {
        Ok(Value::from(x))
    }

    fn visit_i64<E>(self, x: i64) -> std::result::Result<Value, E> {
        Ok(Value::from(x))
    }

    fn visit_f64<E>(self, x: f64) -> std::result::Result<Value, E> {
        Ok(Value::from(x))
    }

    fn visit_str<E: de::Error>(self, x: &str) -> std::result::Result<Value, E> {
        self.fault.spend(text_bytes(x))?;
        Ok(Value::String(x.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut out = Vec::new();
        while let Some(value) = seq.next_element_seed(inner)? {
            self.fault.spend(ELEMENT_BYTES)?;
            out.push(value);
        }
        Ok(Value::Array(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == NUMBER_KEY && out.is_empty() {
                return number(&map.next_value::<String>()?);
            }
            if out.contains_key(&key) {
                return Err(self.fault.raise(duplicate_key(&key)));
            }
            if self.depth == 0 && self.fault.unused == Some(key.as_str()) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value_seed(inner)?;
            let object = if out.is_empty() { OBJECT_BYTES } else { 0 };
            self.fault.spend(object + ENTRY_BYTES + text_bytes(&key))?;
            out.insert(key, value);
        }
        Ok(Value::Object(out))
    }
}

/// serde_json hands every number out as a map with this one key when another crate of the same build switches its
/// `arbitrary_precision` on: gguf-rs does, for us only a peer outside the workspace.
const NUMBER_KEY: &str = "$serde_json::private::Number";

/// The number that `text` is.
fn number<E: de::Error>(text: &str) -> std::result::Result<Value, E> {
    if let Ok(x) = text.parse::<u64>() {
        return Ok(Value::from(x));
    }
    if let Ok(x) = text.parse::<i64>() {
        return Ok(Value::from(x));
    }
    text.parse::<f64>().map(Value::from).map_err(|_| E::custom("not a number"))
}

/// The error for a key that stands twice in one object.
pub(crate) fn duplicate_key(key: &str) -> Error {
    Error::new(ErrorKind::Duplicate)
        .what(format!("\"{}\"", shorten(key)))
        .expected("each key once")
        .found("the same key again")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8], path: &Path) -> Result<Value> {
        let fault = Fault::default();
        fault.parse(bytes, path, 0, Strict { fault: &fault, depth: 0 })
    }

    fn kind(text: &str) -> (ErrorKind, Option<u64>) {
        let e = parse(text.as_bytes(), Path::new("x.json")).expect_err("malformed");
        (e.kind(), e.details().offset)
    }

    #[test]
    fn what_json_allows_and_we_do_not() {
        assert_eq!(kind("{\"a\": 1,\n \"a\": 2}").0, ErrorKind::Duplicate);
        assert_eq!(kind("{\"b\": {\"a\": 1, \"a\": 1}}").0, ErrorKind::Duplicate);
        assert_eq!(kind("[NaN]").0, ErrorKind::BadJson);
        assert_eq!(kind("{} x"), (ErrorKind::BadJson, Some(3)));
        assert_eq!(kind("\u{feff}{}").0, ErrorKind::BadJson);
        assert_eq!(kind("\"\\ud800\"").0, ErrorKind::BadJson);
        assert_eq!(kind(&"[".repeat(200_000)).0, ErrorKind::Limit);
        for text in ["1", "[]", "{}", "\"\"", "[1]", "{\"a\":1}"] {
            let (few, many) = (vec![text; 500], vec![text; 20_000]);
            assert!(parse(format!("[{}]", few.join(",")).as_bytes(), Path::new("x.json")).is_ok(), "{text}");
            assert_eq!(kind(&format!("[{}]", many.join(","))).0, ErrorKind::Limit, "{text}");
        }
        let at_the_limit = format!("{}{}", "[".repeat(JSON_DEPTH_MAX), "]".repeat(JSON_DEPTH_MAX));
        assert!(parse(at_the_limit.as_bytes(), Path::new("x.json")).is_ok());
    }
}
