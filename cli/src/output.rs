//! Everything that reaches stdout and stderr.
//!
//! stdout carries results. stderr carries errors and warnings always, and notes only if someone is there to read them:
//! when it is a terminal, or with `--verbose`.

use crate::failure::Failure;
use kestrel_formats::Error;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

static VERBOSE: AtomicBool = AtomicBool::new(false);

/// What `--verbose` sets.
pub fn set_verbose(verbose: bool) {
    VERBOSE.store(verbose, Ordering::Relaxed);
}

/// Writes to stdout at once. A reader that went away is [`Failure::StdoutClosed`].
pub fn text(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|e| match e.kind() {
        std::io::ErrorKind::BrokenPipe => Failure::StdoutClosed,
        _ => Error::io(Path::new("stdout"), "writing the result", e).into(),
    })
}

/// Writes a JSON value to stdout, on one line.
pub fn json(value: &serde_json::Value) -> Result<(), Failure> {
    text(&format!("{value}\n"))
}

/// A line on stderr. Control characters, which a file can bring into a message, are shown and not obeyed. That stderr
/// is closed cannot be told to anyone.
pub fn message(text: &str) {
    let shown: String = text.split('\n').map(printable).collect::<Vec<_>>().join("\n");
    let _ = writeln!(std::io::stderr().lock(), "{shown}");
}

/// Something that the user should know although the command goes on.
pub fn warnings(file: &Path, warnings: &[String]) {
    for warning in warnings {
        message(&format!("warning: {}: {warning}", file.display()));
    }
}

/// A line on stderr for whoever watches.
pub fn note(text: &str) {
    if VERBOSE.load(Ordering::Relaxed) || std::io::stderr().is_terminal() {
        message(text);
    }
}

/// The text with control characters escaped, so that a name in a file cannot steer the terminal.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // The bidirectional controls turn a line around.
        if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// `4.20 GB`, `12.7 MB`, `830 kB`; powers of 1000, three digits.
pub fn bytes(n: u64) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let n_float = n as f64;
    match units.into_iter().find(|(unit, _)| n_float >= 0.9995 * unit) {
        None => format!("{n} B"),
        Some((unit, name)) => {
            let x = n_float / unit;
            let digits = if x < 9.995 { 2 } else { usize::from(x < 99.95) };
            format!("{x:.digits$} {name}")
        }
    }
}

/// `[256, 4096]`
pub fn shape(shape: &[u64]) -> String {
    format!("{shape:?}")
}

/// Columns of text as wide as their widest cell.
pub struct Table {
    rows: Vec<Vec<String>>,
    /// Numbers are flush right.
    right: Vec<bool>,
}

impl Table {
    /// A table with these headings; a leading `>` makes a column flush right.
    pub fn new(headings: &[&str]) -> Self {
        let right = headings.iter().map(|h| h.starts_with('>')).collect();
        let rows = vec![headings.iter().map(|h| h.trim_start_matches('>').to_owned()).collect()];
        Self { rows, right }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|c| printable(&c)).collect());
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = |i: usize| self.rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max();
        let widths: Vec<usize> = (0..self.right.len()).map(|i| width(i).unwrap_or(0)).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, &width), &right) in row.iter().zip(&widths).zip(&self.right) {
                match right {
                    true => write!(line, "  {cell:>width$}")?,
                    false => write!(line, "  {cell:<width$}")?,
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        let cases = [(999, "999 B"), (1000, "1.00 kB"), (999_700, "1.00 MB"), (4_204_230_080, "4.20 GB")];
        for (n, want) in cases.into_iter().chain([(12_677_472, "12.7 MB"), (123_456, "123 kB")]) {
            assert_eq!(bytes(n), want);
        }
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[31m\u{202e}b é"), "a\\u{1b}[31m\\u{202e}b é");
    }

    #[test]
    fn columns_line_up() {
        let mut t = Table::new(&["name", ">bytes"]);
        t.row(["x".into(), "10000".into()]);
        t.row(["longer".into(), "1".into()]);
        assert_eq!(t.to_string(), "  name    bytes\n  x       10000\n  longer      1\n");
    }
}
