//! A Hugging Face checkpoint folder: config.json, safetensors shards with their index, tokenizer.
//!
//! [`Checkpoint::open`] reads only headers and JSON. It checks that the files, the index and the configuration
//! agree and that every tensor of the architecture is there with its shape, so that nothing later has to.

mod bitsandbytes;
mod config;
pub(crate) mod folder;
mod header;
mod index;
pub mod write;

pub use bitsandbytes::{Declared, Nested, QuantState};
pub use config::{Config, GenerationConfig};
pub use header::safetensors_tensors;

use crate::arch::{self, HyperParams, Storage};
use crate::json::shorten;
use crate::limits::{CONFIG_BYTES_MAX, INDEX_BYTES_MAX, SHARDS_MAX, TOKENIZER_BYTES_MAX};
use crate::map::Map;
use crate::tokenizer::TokenizerData;
use crate::{Error, ErrorKind, GgmlType, Result, WeightType};
use folder::{Folder, Opened};
use index::{Index, PICKLE_SUFFIXES};
pub use safetensors::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The index of a checkpoint in several shards.
pub const INDEX_NAME: &str = "model.safetensors.index.json";
/// The only shard of a checkpoint without an index.
pub const SINGLE_NAME: &str = "model.safetensors";

/// A validated checkpoint folder. Its shards stay open.
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    generation: GenerationConfig,
    hyperparams: HyperParams,
    tied: bool,
    tokenizer: Option<TokenizerData>,
    shards: Vec<Shard>,
    tensors: Vec<SourceTensor>,
    by_name: BTreeMap<String, usize>,
    warnings: Vec<String>,
}

/// One safetensors file.
pub struct Shard {
    /// Where it is.
    pub path: PathBuf,
    /// Its size when it was opened.
    pub file_bytes: u64,
    opened: Opened,
    modified: Option<SystemTime>,
}

/// Where bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Position in [`Checkpoint::shards`].
    pub shard: usize,
    /// Offset of the first byte in the shard.
    pub offset: u64,
    /// How many there are.
    pub n_bytes: u64,
}

/// A tensor as a shard's header lists it.
struct RawTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    place: Place,
}

/// One tensor in a shard, in the element order of PyTorch.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// F32, F16 or BF16, or what bitsandbytes made of it.
    pub dtype: WeightType,
    /// Of the weights, also where the file has packed codes; a convolution has its middle 1.
    pub shape: Vec<u64>,
    /// The numbers, or the codes.
    pub place: Place,
    /// What a matrix of bitsandbytes has beside its codes.
    pub state: Option<Box<QuantState>>,
}

impl SourceTensor {
    fn new(raw: &RawTensor, dtype: WeightType, shape: Vec<u64>, state: Option<Box<QuantState>>) -> Self {
        Self { name: raw.name.clone(), dtype, shape, place: raw.place, state }
    }

    /// Bytes of the weights, their scales included.
    pub fn n_bytes(&self) -> u64 {
        self.place.n_bytes + self.state.as_ref().map_or(0, |state| state.n_bytes())
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checkpoint({}, {:?})", self.dir.display(), self.hyperparams)
    }
}

impl Checkpoint {
    /// Opens and validates a folder.
    ///
    /// Errors name file, field and offset. Kinds worth telling apart: `Unsupported` (another architecture, another
    /// quantization than bitsandbytes', another dtype), `Missing`, `Inconsistent`, `PickleRefused`, `LfsPointer`, `BadPath`.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_with(dir, |_| Ok(()))
    }

    /// The same, for a folder whose weights are used where they lie: shards are mapped before anything of them is read.
    /// The map asks the system for large pages, which it makes of what is not in its cache yet; had a header or a list
    /// of scales been read from the file first, what lies around each would stay in small ones. Once their headers are
    /// known to be right, they are brought into memory, see [`Map::preload`].
    pub fn open_mapped(dir: &Path) -> Result<Self> {
        Self::open_with(dir, |shard| shard.map().map(|_| ()))
    }

    fn open_with(dir: &Path, prepare: impl Fn(&Opened) -> Result<()>) -> Result<Self> {
        let folder = Folder::open(dir)?;
        let config = match folder.read("config.json", CONFIG_BYTES_MAX)? {
            Some((path, bytes)) => Config::parse(&bytes, &path)?,
            None => return Err(missing_file(&folder, "config.json")),
        };
        let generation = match folder.read("generation_config.json", CONFIG_BYTES_MAX)? {
            Some((path, bytes)) => GenerationConfig::parse(&bytes, &path)?.or(&config.ids),
            None => config.ids.clone(),
        };
        let mut warnings = Vec::new();
        let index = match folder.read(INDEX_NAME, INDEX_BYTES_MAX)? {
            Some((path, bytes)) => Some(index::parse(&bytes, &path)?),
            None => None,
        };
        let n_layer = config.n_layer_at_most();
        let (shards, raw) = open_shards(&folder, index.as_ref(), n_layer, prepare, &mut warnings)?;
        drop(index);
        // Before anything else is read of them: what quantized each tensor lies beside it, all over the shards.
        shards.iter().for_each(|shard| shard.opened.preload());
        let tensors = bitsandbytes::assemble(&raw, &shards)?;
        drop(raw);
        warnings.extend(Declared::warning(config.quantization, &tensors));
        let by_name: BTreeMap<String, usize> =
            tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        let has_lm_head = by_name.contains_key("lm_head.weight");
        let d_inner = by_name
            .get("backbone.layers.0.mixer.A_log")
            .and_then(|&i| tensors.get(i)?.shape.first().copied());
        let (hyperparams, notes) = config.hyperparams(has_lm_head, d_inner)?;
        warnings.extend(notes);
        let mut checkpoint = Self {
            dir: dir.to_owned(),
            config,
            generation,
            hyperparams,
            tied: !has_lm_head,
            tokenizer: None,
            shards,
            tensors,
            by_name,
            warnings,
        };
        checkpoint.check_tensors()?;
        checkpoint.tokenizer = TokenizerData::from_folder(&folder, &checkpoint.generation)?
            .map(|tokenizer| tokenizer.padded_to(checkpoint.hyperparams.vocab_size))
            .transpose()
            .map_err(|e| e.file(&checkpoint.dir.join("tokenizer.json")))?;
        match &checkpoint.tokenizer {
            Some(tokenizer) => checkpoint.warnings.extend(tokenizer.warnings.iter().cloned()),
            None => checkpoint.warnings.push("the folder has no tokenizer.json".to_owned()),
        }
        Ok(checkpoint)
    }

    /// The bytes of another file of the folder, at most as large as a tokenizer may be; `None` if there is none.
    pub fn companion(&self, name: &str) -> Result<Option<Vec<u8>>> {
        Ok(Folder::open(&self.dir)?.read(name, TOKENIZER_BYTES_MAX)?.map(|(_, bytes)| bytes))
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What fixes every shape.
    pub fn hyperparams(&self) -> &HyperParams {
        &self.hyperparams
    }

    /// Whether there is no lm_head, so that the embedding is the output matrix. A checkpoint whose lm_head equals
    /// the embedding byte for byte is not called tied here.
    pub fn tied(&self) -> bool {
        self.tied
    }

    /// The parsed config.json.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tokenizer padded to `vocab_size`, if the folder has a tokenizer.json.
    pub fn tokenizer(&self) -> Option<&TokenizerData> {
        self.tokenizer.as_ref()
    }

    /// Special ids of generation_config.json, with those of config.json where it names none.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// The safetensors files, sorted by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// What is odd but not wrong.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The tensor with this name in the checkpoint.
    pub fn tensor(&self, hf_name: &str) -> Option<&SourceTensor> {
        self.by_name.get(hf_name).and_then(|&i| self.tensors.get(i))
    }

    /// All tensors, by shard and by place in it.
    pub fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    /// Fills `buf` with the bytes at `place` from `byte_offset` on. Positioned, so threads may read at once.
    ///
    /// Errors: `DataOutOfBounds` if the range is not in the place, `Changed` if the shard has shrunk, `Io`.
    pub fn read(&self, place: &Place, byte_offset: u64, buf: &mut [u8]) -> Result<()> {
        let shard = self.shard_of(place)?;
        let end = byte_offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > place.n_bytes) {
            return Err(Error::new(ErrorKind::DataOutOfBounds)
                .file(&shard.path)
                .at(place.offset)
                .expected(format!("a range in {} bytes", place.n_bytes))
                .found(format!("{} bytes from {byte_offset}", buf.len())));
        }
        shard.read_at(place.offset.saturating_add(byte_offset), buf)
    }

    /// The map of the place's shard, made at the first call, and where in it the bytes lie.
    pub fn map(&self, place: &Place) -> Result<(Map, Range<usize>)> {
        let shard = self.shard_of(place)?;
        let map = shard.opened.map()?;
        let range = place.offset as usize..place.offset.saturating_add(place.n_bytes) as usize;
        if map.get(range.clone()).is_none() {
            return Err(shard.opened.changed(format!("{} bytes", map.len())));
        }
        Ok((map.clone(), range))
    }

    /// `Changed` if a shard's size or time of modification is not what it was when it was opened. Called after
    /// the last read, it tells that no shard was written to meanwhile.
    pub fn check_unchanged(&self) -> Result<()> {
        for shard in &self.shards {
            let meta = shard
                .opened
                .file
                .metadata()
                .map_err(|e| Error::io(&shard.path, "reading the file's size", e))?;
            if meta.len() != shard.file_bytes {
                return Err(shard.opened.changed(format!("{} bytes", meta.len())));
            }
            if meta.modified().ok() != shard.modified {
                return Err(shard.opened.changed("another time of modification".to_owned()));
            }
        }
        Ok(())
    }

    fn shard_of(&self, place: &Place) -> Result<&Shard> {
        self.shards.get(place.shard).ok_or_else(|| {
            Error::new(ErrorKind::Usage).file(&self.dir).expected("a place in this checkpoint")
        })
    }

    /// Every tensor of the architecture is there with its shape, and no other.
    fn check_tensors(&mut self) -> Result<()> {
        let config_path = self.dir.join("config.json");
        if self.tied && self.config.tie_word_embeddings == Some(false) {
            return Err(Error::new(ErrorKind::Missing)
                .file(&config_path)
                .what("tensor \"lm_head.weight\"")
                .expected("an output matrix, because tie_word_embeddings is false")
                .found("none in the files"));
        }
        if !self.tied && self.config.tie_word_embeddings != Some(false) {
            self.warnings
                .push("tie_word_embeddings is true but the files hold lm_head.weight: it is used".to_owned());
        }
        let h = self.hyperparams;
        let wanted: Vec<_> = arch::tensors(&h, self.tied);
        let mut missing = Vec::new();
        for (spec, layer) in &wanted {
            let name = spec.hf_name(*layer);
            let Some(tensor) = self.tensor(&name) else {
                missing.push(name);
                continue;
            };
            let shapes: [Vec<u64>; 2] = [spec.hf_shape, spec.shape].map(|shape| widen(shape(&h)));
            if !shapes.contains(&tensor.shape) {
                let [expected, _] = &shapes;
                let shard = self.shard_of(&tensor.place)?;
                return Err(Error::new(ErrorKind::BadShape)
                    .file(&shard.path)
                    .at(tensor.place.offset)
                    .what(format!("tensor \"{name}\""))
                    .expected(format!("{expected:?} by config.json"))
                    .found(format!("{:?}", tensor.shape)));
            }
            if tensor.state.is_some() && spec.storage != Storage::Quantizable {
                let shard = self.shard_of(&tensor.place)?;
                return Err(Error::new(ErrorKind::WrongType)
                    .file(&shard.path)
                    .at(tensor.place.offset)
                    .what(format!("tensor \"{name}\""))
                    .expected("F32, F16 or BF16: only matrices are quantized")
                    .found(tensor.dtype));
            }
        }
        if !missing.is_empty() {
            return Err(Error::new(ErrorKind::Missing)
                .file(&self.dir)
                .what(list_names(&missing))
                .expected(format!("{} tensors for {} layers", wanted.len(), h.n_layer))
                .found(format!("{} of them missing", missing.len())));
        }
        if self.tensors.len() > wanted.len() {
            return Err(self.unexpected_tensors(&wanted));
        }
        Ok(())
    }

    fn unexpected_tensors(&self, wanted: &[(&arch::TensorSpec, usize)]) -> Error {
        let mut names: Vec<String> = wanted.iter().map(|(spec, layer)| spec.hf_name(*layer)).collect();
        names.sort_unstable();
        let extra: Vec<String> =
            self.by_name.keys().filter(|name| names.binary_search(name).is_err()).cloned().collect();
        Error::new(ErrorKind::Unexpected)
            .file(&self.dir)
            .what(list_names(&extra))
            .expected(format!("{} tensors for {} layers", wanted.len(), self.hyperparams.n_layer))
            .found(format!("{} more", extra.len()))
    }
}

impl Shard {
    /// Fills `buf` from `offset` of the file, for a hash of the whole shard.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.opened.read_at(offset, buf)
    }
}

fn widen(shape: Vec<usize>) -> Vec<u64> {
    shape.into_iter().map(|dim| dim as u64).collect()
}

/// The first three names, and how many more.
fn list_names(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(3).map(|name| format!("\"{}\"", shorten(name))).collect();
    let more = names.len().saturating_sub(3);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("tensor {}{rest}", shown.join(", "))
}

/// `PickleRefused` if the folder's weights are pickles, else `Missing`.
fn missing_file(folder: &Folder, name: &str) -> Error {
    match folder.find(&PICKLE_SUFFIXES) {
        Ok(Some(pickle)) if name != "config.json" => Error::new(ErrorKind::PickleRefused)
            .file(&folder.path().join(pickle))
            .expected(format!("{name} or {INDEX_NAME}"))
            .found("only PyTorch pickles, which can run code when loaded")
            .hint("convert them with transformers' save_pretrained, or download the safetensors revision"),
        _ => {
            Error::new(ErrorKind::Missing).file(&folder.path().join(name)).expected("the file").found("none")
        }
    }
}

/// Opens all shards and lists their tensors; index and headers must agree.
fn open_shards(
    folder: &Folder,
    index: Option<&Index>,
    n_layer: usize,
    prepare: impl Fn(&Opened) -> Result<()>,
    warnings: &mut Vec<String>,
) -> Result<(Vec<Shard>, Vec<RawTensor>)> {
    let single = [SINGLE_NAME.to_owned()];
    let names = index.map_or(&single[..], |index| &index.shards);
    if names.len() as u64 > SHARDS_MAX {
        return Err(Error::new(ErrorKind::Limit)
            .file(&folder.path().join(INDEX_NAME))
            .what("shards")
            .expected(format!("at most {SHARDS_MAX}"))
            .found(names.len()));
    }
    let mut opened = Vec::with_capacity(names.len());
    let mut absent = Vec::new();
    for name in names {
        match folder.file(name)? {
            Some(file) => opened.push(file),
            None => absent.push(name.as_str()),
        }
    }
    if !absent.is_empty() {
        if index.is_none() {
            return Err(missing_file(folder, SINGLE_NAME));
        }
        return Err(Error::new(ErrorKind::Missing)
            .file(folder.path())
            .what(format!("shard {}", absent.join(", ")))
            .expected(format!("the {} files that {INDEX_NAME} lists", names.len()))
            .found(format!("{} of them missing", absent.len())));
    }
    let (mut shards, mut tensors) = (Vec::new(), Vec::new());
    for (i, opened) in opened.into_iter().enumerate() {
        prepare(&opened)?;
        let (shard, mut held) = open_shard(opened, i, n_layer, warnings)?;
        if let Some(index) = index {
            check_listed(&shard, i, &held, index)?;
        }
        match tensors.is_empty() {
            true => tensors = held,
            false => tensors.append(&mut held),
        }
        shards.push(shard);
    }
    if let Some(index) = index {
        check_all_held(folder, index, &tensors)?;
        let total: u64 = tensors.iter().map(|t| t.place.n_bytes).sum();
        if let Some(written) = index.total_size.filter(|&written| written != total) {
            warnings.push(format!("{INDEX_NAME} says total_size {written}, the tensors have {total} bytes"));
        }
    }
    Ok((shards, tensors))
}

fn open_shard(
    opened: Opened,
    i: usize,
    n_layer: usize,
    warnings: &mut Vec<String>,
) -> Result<(Shard, Vec<RawTensor>)> {
    let header = header::read(&opened, &|name| bitsandbytes::is_known(name, n_layer))?;
    warnings.extend(header.warnings.iter().map(|w| format!("{}: {w}", opened.path.display())));
    let mut tensors = Vec::with_capacity(header.tensors.len());
    for (name, info) in header.tensors {
        let (begin, end) = info.data_offsets;
        let offset = header.data_start.saturating_add(begin as u64);
        let place = Place { shard: i, offset, n_bytes: (end - begin) as u64 };
        tensors.push(RawTensor { name, dtype: info.dtype, shape: widen(info.shape), place });
    }
    tensors.sort_by_key(|t| t.place.offset);
    let modified = opened.file.metadata().ok().and_then(|m| m.modified().ok());
    let shard = Shard { path: opened.path.clone(), file_bytes: opened.n_bytes, opened, modified };
    Ok((shard, tensors))
}

fn describe_tensor(name: &str) -> String {
    format!("tensor \"{}\"", shorten(name))
}

/// The type of plain numbers.
fn dtype_of(dtype: Dtype) -> Option<GgmlType> {
    match dtype {
        Dtype::F32 => Some(GgmlType::F32),
        Dtype::F16 => Some(GgmlType::F16),
        Dtype::BF16 => Some(GgmlType::Bf16),
        _ => None,
    }
}

/// Every tensor of the shard is in the index, under this shard.
fn check_listed(shard: &Shard, i: usize, held: &[RawTensor], index: &Index) -> Result<()> {
    for tensor in held {
        let error = |kind| {
            Error::new(kind).file(&shard.path).at(tensor.place.offset).what(describe_tensor(&tensor.name))
        };
        match index.shard_of(&tensor.name) {
            Some(listed) if listed == i => {}
            Some(listed) => {
                let other = index.shards.get(listed).map_or("another shard", String::as_str);
                return Err(error(ErrorKind::Inconsistent)
                    .expected(format!("the tensor in {other}, where {INDEX_NAME} lists it"))
                    .found("it in this file"));
            }
            None => {
                return Err(error(ErrorKind::Unexpected)
                    .expected(format!("only tensors that {INDEX_NAME} lists"))
                    .found("one that it does not"));
            }
        }
    }
    Ok(())
}

/// Every tensor of the index is in a shard.
fn check_all_held(folder: &Folder, index: &Index, tensors: &[RawTensor]) -> Result<()> {
    if index.tensors.len() == tensors.len() {
        return Ok(());
    }
    let mut held: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    held.sort_unstable();
    let listed = index.tensors.iter().map(|(name, _)| name);
    let absent: Vec<String> =
        listed.filter(|name| held.binary_search(&name.as_str()).is_err()).cloned().collect();
    Err(Error::new(ErrorKind::Missing)
        .file(&folder.path().join(INDEX_NAME))
        .what(list_names(&absent))
        .expected("every listed tensor in its shard")
        .found(format!("{} missing", absent.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiny_model_opens() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny-falcon-mamba");
        let checkpoint = Checkpoint::open(&dir).expect("the tiny model");
        assert!(checkpoint.warnings().is_empty(), "{:?}", checkpoint.warnings());
        assert_eq!((checkpoint.shards().len(), checkpoint.tensors().len()), (2, 63));
        assert!(!checkpoint.tied());
        let tokenizer = checkpoint.tokenizer().expect("a tokenizer");
        assert_eq!((tokenizer.tokens.len(), tokenizer.merges.len()), (4096, 3828));
        assert_eq!((tokenizer.bos, &tokenizer.eos, tokenizer.pad), (Some(11), &vec![11], Some(11)));
        let tensor = checkpoint.tensor("backbone.layers.1.mixer.D").expect("D");
        let mut bytes = vec![0; tensor.place.n_bytes as usize];
        checkpoint.read(&tensor.place, 0, &mut bytes).expect("reads");
        let (map, range) = checkpoint.map(&tensor.place).expect("maps");
        assert_eq!(map.get(range), Some(&bytes[..]));
        let past = checkpoint.read(&tensor.place, 2, &mut bytes).expect_err("past the end");
        assert_eq!(past.kind(), ErrorKind::DataOutOfBounds);
        checkpoint.check_unchanged().expect("nobody wrote to it");

        // From the maps the same, and the same error past the end of a shard.
        let mapped = Checkpoint::open_mapped(&dir).expect("the tiny model");
        assert_eq!(mapped.tensors(), checkpoint.tensors());
        for shard in [&mapped.shards()[0], &checkpoint.shards()[0]] {
            let mut last = vec![0; 8];
            shard.read_at(shard.file_bytes - 8, &mut last).expect("reads");
            assert_eq!(last, std::fs::read(&shard.path).expect("the file")[shard.file_bytes as usize - 8..]);
            for offset in [shard.file_bytes - 7, shard.file_bytes + 1] {
                let past = shard.read_at(offset, &mut last).expect_err("past the end");
                assert_eq!(past.kind(), ErrorKind::Changed, "{offset}: {past:?}");
            }
            shard.read_at(u64::MAX, &mut last).expect_err("no such offset");
        }
    }
}
