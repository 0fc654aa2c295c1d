//! Files that the user names: friendlier errors for the usual mistakes, and texts.

use crate::args::TextArgs;
use kestrel_convert::Source;
use kestrel_formats::{Error, ErrorKind, Result};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Bytes of a prompt or a text. The largest use is a corpus for `perplexity`.
const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Opens a GGUF file or a checkpoint folder.
pub fn open_source(path: &Path) -> Result<Source> {
    check_model_path(path)?;
    Source::open(path)
}

/// Catches, before any reader complains about its own format, what users pass instead of a model.
pub fn check_model_path(path: &Path) -> Result<()> {
    if path.is_dir() {
        return check_folder(path);
    }
    match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let error = Error::new(ErrorKind::Missing)
                .file(path)
                .what("model")
                .expected("a GGUF file or a Hugging Face folder")
                .found("nothing at this path");
            Err(match looks_like_hub_name(path) {
                true => error.hint(format!(
                    "kestrel reads local files; hf download {} --local-dir DIR fetches a model",
                    path.display()
                )),
                false => error,
            })
        }
        Err(e) => Err(Error::io(path, "opening the model", e)),
    }
}

/// A folder that is no checkpoint but holds GGUF files.
fn check_folder(path: &Path) -> Result<()> {
    if path.join("config.json").exists() {
        return Ok(());
    }
    let mut ggufs: Vec<PathBuf> = std::fs::read_dir(path)
        .map_err(|e| Error::io(path, "reading the folder", e))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")))
        .collect();
    ggufs.sort();
    match ggufs.first() {
        None => Ok(()), // the checkpoint reader says what is missing
        Some(first) => Err(Error::new(ErrorKind::Missing)
            .file(path)
            .what("config.json")
            .expected("a Hugging Face folder")
            .found(format!("{} GGUF files", ggufs.len()))
            .hint(format!("give the file itself: {}", first.display()))),
    }
}

/// `organisation/model`, as the hub names models.
fn looks_like_hub_name(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.split_once('/').is_some_and(|(organisation, model)| {
        !organisation.is_empty() && !model.is_empty() && !organisation.contains('.') && !model.contains('/')
    }) && path.extension().is_none_or(|e| e != "gguf")
}

/// The text that `-p` or `-f` gives.
pub fn text(args: &TextArgs) -> Result<String> {
    match (&args.prompt, &args.file) {
        (Some(text), _) => Ok(text.clone()),
        (None, Some(path)) => read_text(path),
        (None, None) => Err(Error::new(ErrorKind::Usage).what("text").expected("--prompt or --file")),
    }
}

/// A UTF-8 file, a pipe, or stdin for `-`.
pub fn read_text(path: &Path) -> Result<String> {
    if path == Path::new("-") {
        return read_all(std::io::stdin().lock(), Path::new("stdin"));
    }
    if path.is_dir() {
        return Err(Error::new(ErrorKind::NotRegularFile)
            .file(path)
            .expected("a text file")
            .found("a folder"));
    }
    let file = File::open(path).map_err(|e| Error::io(path, "opening the text", e))?;
    read_all(file, path)
}

fn read_all(reader: impl Read, path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let n = reader.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes);
    let n = n.map_err(|e| Error::io(path, "reading the text", e))? as u64;
    if n > TEXT_BYTES_MAX {
        return Err(Error::new(ErrorKind::Limit)
            .file(path)
            .expected(format!("at most {TEXT_BYTES_MAX} bytes of text"))
            .found("more"));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to() as u64;
        Error::new(ErrorKind::WrongType).file(path).at(at).expected("UTF-8 text").found("other bytes")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_names_are_told_from_paths() {
        for name in ["tiiuae/falcon-mamba-7b", "a/b"] {
            assert!(looks_like_hub_name(Path::new(name)), "{name}");
        }
        for path in ["/a/b", "./a/b", "../b", "a", "a/b/c", "models/x.gguf"] {
            assert!(!looks_like_hub_name(Path::new(path)), "{path}");
        }
    }
}
