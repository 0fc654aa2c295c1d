//! The key-value pairs of the output.

use crate::input::{Input, SSM_X_SCALE, Source};
use crate::plan::{Options, PlannedTensor, Target};
use kestrel_formats::arch::Arch;
use kestrel_formats::checkpoint::Checkpoint;
use kestrel_formats::gguf::{self, Gguf, KEY_ARCHITECTURE, Value};
use kestrel_formats::imatrix::Imatrix;
use kestrel_formats::limits::CONFIG_BYTES_MAX;
use kestrel_formats::map::open_regular;
use kestrel_formats::{ErrorKind, Result};
use kestrel_quant::recipe::FileType;
use std::io::Read;
use std::path::Path;

/// `kestrel.*` key of the files that were read, each as `NAME SHA256`.
pub const SOURCE_SHA256: &str = "kestrel.source.sha256";
/// What [`SOURCE_SHA256`] was in a GGUF that was itself the source: the files of the checkpoint.
const ORIGIN_SHA256: &str = "kestrel.origin.sha256";
/// The calibration by which tensors were quantized with error feedback.
pub(crate) const CALIBRATION_FILE: &str = "kestrel.calibration.file";
/// Mean KL divergence from the source, as the calibration predicts it.
const PREDICTED_KL: &str = "kestrel.predicted_kl";
const FILE_TYPE: &str = "general.file_type";
const QUANTIZATION_VERSION: &str = "general.quantization_version";
/// Version of ggml's block formats; all of today's files have it.
const QUANTIZATION_VERSION_NOW: u32 = 2;

/// What a new file says itself, whatever a source GGUF says; a trailing dot stands for all keys below.
const REPLACED: [&str; 10] = [
    FILE_TYPE,
    QUANTIZATION_VERSION,
    "general.alignment",
    "split.",
    "quantize.imatrix.",
    "kestrel.version",
    "kestrel.recipe",
    "kestrel.calibration.",
    PREDICTED_KL,
    SOURCE_SHA256,
];

/// All pairs, in the order of the file.
pub(crate) fn pairs(
    source: &Source,
    input: &Input,
    options: &Options,
    tensors: &[PlannedTensor],
    (file_type, predicted_kl): (FileType, Option<f64>),
) -> Result<Vec<(String, Value)>> {
    let mut pairs = match source {
        Source::Checkpoint(c) => of_checkpoint(c, input)?,
        Source::Gguf(g) => of_gguf(g),
    };
    let mut add = |key: &str, value: Value| pairs.push((key.to_owned(), value));
    add(FILE_TYPE, file_type.id().into());
    if tensors.iter().any(|t| t.dtype.is_quantized()) {
        add(QUANTIZATION_VERSION, QUANTIZATION_VERSION_NOW.into());
    }
    if let Some(imatrix) = options.imatrix.as_ref().filter(|_| tensors.iter().any(|t| t.weighted)) {
        imatrix_provenance(imatrix).into_iter().for_each(|(key, value)| add(key, value));
    }
    if let Some(calibration) = options.calibration.as_ref().filter(|_| tensors.iter().any(|t| t.fed)) {
        add(CALIBRATION_FILE, calibration.path().display().to_string().into());
        add("kestrel.calibration.dataset", calibration.dataset().unwrap_or_default().into());
    }
    if let Some(kl) = predicted_kl {
        add(PREDICTED_KL, (kl as f32).into());
    }
    add("kestrel.version", env!("CARGO_PKG_VERSION").into());
    add("kestrel.recipe", recipe_text(options).into());
    let unknown = vec!["0".repeat(64); input.files.len()];
    add(SOURCE_SHA256, source_sha256(input, &unknown));
    Ok(pairs)
}

/// The value of [`SOURCE_SHA256`]; digests have one length, so the header's size does not depend on them.
pub(crate) fn source_sha256(input: &Input, digests: &[String]) -> Value {
    let lines = input.files.iter().zip(digests).map(|(file, digest)| format!("{} {digest}", file.name()));
    lines.collect::<Vec<_>>().into()
}

/// File type and overrides, as the command line takes them.
fn recipe_text(options: &Options) -> String {
    let mut text = options.recipe.file_type().name().to_owned();
    for (pattern, ty) in options.recipe.overrides() {
        text.push_str(&format!(" --tensor-type {pattern}={}", ty.name().to_lowercase()));
    }
    match options.target {
        None => {}
        Some(Target::Bytes(n)) => text.push_str(&format!(" --target-size {n}")),
        Some(Target::BitsPerWeight(bpw)) => text.push_str(&format!(" --target-bpw {bpw}")),
        Some(Target::Kl(kl)) => text.push_str(&format!(" --target-kl {kl}")),
    }
    text
}

/// The keys and types that llama-quantize writes.
fn imatrix_provenance(imatrix: &Imatrix) -> Vec<(&'static str, Value)> {
    let mut pairs = vec![("quantize.imatrix.file", imatrix.path().display().to_string().into())];
    if let Some(dataset) = imatrix.datasets().first() {
        pairs.push(("quantize.imatrix.dataset", dataset.as_str().into()));
    }
    pairs.push(("quantize.imatrix.entries_count", (imatrix.len() as u32).into()));
    if let Some(chunks) = imatrix.chunks() {
        pairs.push(("quantize.imatrix.chunks_count", chunks.into()));
    }
    pairs
}

fn of_checkpoint(c: &Checkpoint, input: &Input) -> Result<Vec<(String, Value)>> {
    let text = |key: &str, value: String| (key.to_owned(), Value::from(value));
    let n_weights = input.tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum();
    let mut pairs = vec![
        text(KEY_ARCHITECTURE, gguf::ARCHITECTURE.to_owned()),
        text("general.type", "model".to_owned()),
        text("general.name", model_name(c.dir())),
        text("general.size_label", size_label(n_weights)),
    ];
    pairs.extend(license(c.dir())?.into_iter().map(|(key, value)| text(key, value)));
    pairs.extend(gguf::architecture_metadata(&input.h));
    pairs.extend(c.tokenizer().map(|t| t.to_metadata()).unwrap_or_default());
    if input.h.arch == Arch::FalconMamba {
        pairs.push(("kestrel.mixer_rms_eps".to_owned(), input.h.mixer_rms_eps.into()));
        pairs.push((SSM_X_SCALE.to_owned(), input.h.x_proj_scale().into()));
    }
    Ok(pairs)
}

fn of_gguf(g: &Gguf) -> Vec<(String, Value)> {
    let replaced = |key: &str| REPLACED.iter().any(|r| key == *r || (r.ends_with('.') && key.starts_with(r)));
    let has_origin = g.metadata().contains(ORIGIN_SHA256);
    let mut pairs = Vec::new();
    for (key, value) in g.metadata().to_pairs() {
        if key == SOURCE_SHA256 && !has_origin {
            pairs.push((ORIGIN_SHA256.to_owned(), value));
        } else if !replaced(&key) {
            pairs.push((key, value));
        }
    }
    pairs
}

/// The folder's name, or the repository's if the folder is a snapshot of the Hugging Face cache
/// (`models--OWNER--NAME/snapshots/REVISION`).
fn model_name(dir: &Path) -> String {
    let dir = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match dir.parent() {
        Some(parent) if name(parent) == "snapshots" => {
            let repository = parent.parent().map(name).unwrap_or_default();
            repository.rsplit("--").next().unwrap_or_default().to_owned()
        }
        _ => name(&dir),
    }
}

/// Number of weights with two digits or more: 7272665088 is `7.3B`.
fn size_label(n_weights: u64) -> String {
    let n = n_weights as f64;
    let (scaled, unit) = match n {
        _ if n >= 1e12 => (n / 1e12, "T"),
        _ if n >= 1e9 => (n / 1e9, "B"),
        _ if n >= 1e6 => (n / 1e6, "M"),
        _ => (n / 1e3, "K"),
    };
    if scaled < 9.95 { format!("{scaled:.1}{unit}") } else { format!("{scaled:.0}{unit}") }
}

/// The license as the model card's front matter has it, under the keys that llama.cpp's converter uses.
fn license(dir: &Path) -> Result<Vec<(&'static str, String)>> {
    const KEYS: [(&str, &str); 3] = [
        ("license", "general.license"),
        ("license_name", "general.license.name"),
        ("license_link", "general.license.link"),
    ];
    let mut bytes = Vec::new();
    match open_regular(&dir.join("README.md")) {
        // A card that is no file, or none at all, is no reason to fail.
        Err(e) if matches!(e.kind(), ErrorKind::Io | ErrorKind::NotRegularFile) => return Ok(Vec::new()),
        Err(e) => return Err(e),
        Ok(file) => {
            let read = file.take(CONFIG_BYTES_MAX).read_to_end(&mut bytes);
            read.map_err(|e| kestrel_formats::Error::io(&dir.join("README.md"), "reading the file", e))?
        }
    };
    let text = String::from_utf8_lossy(&bytes);
    Ok(front_matter(&text, &KEYS))
}

/// The simple `key: value` lines between the two `---` at the head of a Markdown file.
fn front_matter(text: &str, keys: &[(&str, &'static str)]) -> Vec<(&'static str, String)> {
    let mut lines = text.lines();
    if lines.next().map(str::trim_end) != Some("---") {
        return Vec::new();
    }
    let mut found = Vec::new();
    for line in lines.take_while(|l| l.trim_end() != "---") {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim().trim_matches(['"', '\'']);
        let known = keys.iter().find(|(k, _)| *k == key).map(|(_, gguf_key)| *gguf_key);
        if let Some(gguf_key) = known
            && !value.is_empty()
            && found.iter().all(|(k, _)| *k != gguf_key)
        {
            found.push((gguf_key, value.to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_labels() {
        let labels = [7_272_665_088, 6_200_000, 129_000_000, 9_960_000, 999].map(size_label);
        assert_eq!(labels, ["7.3B", "6.2M", "129M", "10M", "1.0K"]);
    }

    #[test]
    fn snapshot_folders_are_named_after_the_repository() {
        assert_eq!(
            model_name(Path::new("/x/models--tiiuae--falcon-mamba-7b/snapshots/0a1b")),
            "falcon-mamba-7b"
        );
        assert_eq!(model_name(Path::new("/x/falcon-mamba-7b/")), "falcon-mamba-7b");
    }

    #[test]
    fn front_matter_gives_known_keys_once_and_only_from_the_head() {
        let keys = [("license", "general.license"), ("license_name", "general.license.name")];
        let card = "---\nlanguage:\n- en\nlicense: other\nlicense_name: \"falcon-mamba-7b-license\"\nlicense: mit\n---\nx";
        let expected = [
            ("general.license", "other".to_owned()),
            ("general.license.name", "falcon-mamba-7b-license".to_owned()),
        ];
        assert_eq!(front_matter(card, &keys), expected);
        assert!(front_matter("text\n---\nlicense: mit\n---\n", &keys).is_empty());
    }
}
