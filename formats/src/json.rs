//! Strict JSON: duplicate keys, deep nesting and structural errors become typed errors with a byte offset.
//!
//! serde's own errors are text. A visitor that knows better leaves its [`Error`] in a [`Fault`] before it stops the
//! parser, and [`Fault::finish`] prefers that error to the parser's.

use crate::limits::JSON_DEPTH_MAX;
use crate::{Error, ErrorKind, Result};
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::fmt;
use std::path::Path;

/// Where a visitor leaves its error.
#[derive(Default)]
pub(crate) struct Fault(RefCell<Option<Error>>);

impl Fault {
    /// Keeps the first `error` and gives the parser something to stop with.
    pub(crate) fn raise<E: de::Error>(&self, error: Error) -> E {
        self.0.borrow_mut().get_or_insert(error);
        E::custom("stopped")
    }

    /// Deserializes the whole of `bytes`, a JSON text that starts at `base` in `path`.
    pub(crate) fn parse<'de, S: DeserializeSeed<'de>>(
        &self,
        bytes: &'de [u8],
        path: &Path,
        base: u64,
        seed: S,
    ) -> Result<S::Value> {
        let mut parser = serde_json::Deserializer::from_slice(bytes);
        let result = seed.deserialize(&mut parser).and_then(|value| parser.end().map(|()| value));
        result.map_err(|e| {
            let offset = base.saturating_add(byte_offset(bytes, &e));
            match self.0.take() {
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

/// Parses a whole file's JSON. Duplicate keys anywhere and nesting deeper than 64 are refused.
pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Value> {
    let fault = Fault::default();
    fault.parse(bytes, path, 0, Strict { fault: &fault, depth: 0 })
}

/// As [`parse`], and the value must be an object.
pub(crate) fn parse_object(bytes: &[u8], path: &Path) -> Result<Map<String, Value>> {
    match parse(bytes, path)? {
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

    fn visit_str<E>(self, x: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(x.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut out = Vec::new();
        while let Some(value) = seq.next_element_seed(inner)? {
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
            let value = map.next_value_seed(inner)?;
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
        let at_the_limit = format!("{}{}", "[".repeat(JSON_DEPTH_MAX), "]".repeat(JSON_DEPTH_MAX));
        assert!(parse(at_the_limit.as_bytes(), Path::new("x.json")).is_ok());
    }
}
