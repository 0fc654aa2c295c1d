//! The table of bad and odd inputs: how each is made, which command meets it, and how that must end. The binary runs
//! the table in `cli/tests/bad_inputs.rs`, the fuzz targets start from it, and peers get the same files from
//! `examples/write_bad_inputs.rs`.
//!
//! Names carry the number of the case in the matrix: G a GGUF file, S safetensors, I an index, C a configuration, B a
//! checkpoint of bitsandbytes, T a tokenizer, X a file of another kind. The group `llama.cpp` has the names of that
//! project's own test.

mod bitsandbytes;
mod checkpoint;
mod container;
mod files;
mod gguf_model;
mod gguf_tokenizer;
mod llama_cpp;
mod other_files;
mod safetensors;
mod template;
mod tokenizer;
mod weights;

pub use gguf_model::SMALL;
pub use gguf_tokenizer::with_vocabulary;
pub use other_files::{base, calibration, wide_model};

use crate::gguf_builder::{GgufBuilder, Raw, RawTensor};
use crate::temp_dir::TempDir;
use kestrel_formats::{ErrorKind, ErrorKind as Kind};
use std::path::PathBuf;

/// One input and how it must end.
pub struct Case {
    /// The part of the table that it belongs to.
    pub group: &'static str,
    /// Unique in the table.
    pub name: String,
    /// What lies in the folder.
    pub files: Files,
    /// The command that has to say what the table says.
    pub action: Action,
    /// What it has to say.
    pub expect: Expect,
}

/// Makes what a case needs in an empty folder and returns the path to give to the command.
pub type Make = Box<dyn Fn(&TempDir) -> PathBuf + Send + Sync>;

/// How an input is made.
pub enum Files {
    /// One file that claims to be GGUF, with these bytes.
    Gguf(Vec<u8>),
    /// Anything else.
    Folder(Make),
}

/// A command of the binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// `inspect MODEL`: reads the container, or all of a checkpoint folder.
    Inspect,
    /// `tokenize MODEL`: reads the vocabulary as well.
    Tokenize,
    /// `logits MODEL`: loads the model and runs it over two tokens.
    Logits,
    /// `run MODEL`: continues a text.
    Run,
    /// `run MODEL --chat`: renders the chat template.
    Chat,
    /// `quantize` or `convert`, by what the input is.
    Convert,
    /// `verify MODEL --source MODEL`.
    Verify,
    /// `run GOOD --load-state FILE` with a good model of the case's folder, `good.gguf`.
    LoadState,
    /// `quantize GOOD --imatrix FILE` with the same model.
    Imatrix,
    /// `quantize GOOD --calibration FILE`.
    Calibration,
    /// `perplexity GOOD --kl-base FILE`.
    KlBase,
    /// `eval GOOD --requests FILE`.
    Requests,
    /// `diff FILE FILE`.
    Diff,
}

/// What has to come out.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    /// An error of this kind.
    Reject(ErrorKind),
    /// An error of this kind at this byte of the file.
    RejectAt(ErrorKind, u64),
    /// An error of this kind whose text holds this.
    RejectWith(ErrorKind, &'static str),
    /// Success, without warnings.
    Accept,
    /// Success, with exactly one warning, which contains this.
    Warn(&'static str),
}

use Expect::{Accept, Reject, RejectAt, RejectWith, Warn};

fn case(name: impl Into<String>, bytes: impl Into<Vec<u8>>, expect: Expect) -> Case {
    Case {
        group: "container",
        name: name.into(),
        files: Files::Gguf(bytes.into()),
        action: Action::Inspect,
        expect,
    }
}

fn folder_case(
    group: &'static str,
    name: impl Into<String>,
    expect: Expect,
    make: impl Fn(&TempDir) -> PathBuf + Send + Sync + 'static,
) -> Case {
    Case { group, name: name.into(), files: Files::Folder(Box::new(make)), action: Action::Inspect, expect }
}

impl Case {
    fn group(self, group: &'static str) -> Self {
        Self { group, ..self }
    }

    fn by(self, action: Action) -> Self {
        Self { action, ..self }
    }

    /// Makes the input in `dir` and returns the path for the command.
    pub fn make(&self, dir: &TempDir) -> PathBuf {
        match &self.files {
            Files::Gguf(bytes) => dir.file("case.gguf", bytes),
            Files::Folder(make) => make(dir),
        }
    }
}

/// The parts of the table about GGUF containers. None of it is large, so that Miri can make them.
pub fn containers() -> Vec<Case> {
    let mut cases = llama_cpp::cases();
    cases.extend(container::cases());
    cases
}

/// The whole table.
pub fn table() -> Vec<Case> {
    let mut cases = containers();
    cases.extend(files::cases());
    cases.extend(gguf_model::cases());
    cases.extend(gguf_tokenizer::cases());
    cases.extend(weights::cases());
    cases.extend(safetensors::cases());
    cases.extend(checkpoint::cases());
    cases.extend(bitsandbytes::cases());
    cases.extend(tokenizer::cases());
    cases.extend(template::cases());
    cases.extend(other_files::cases());
    cases
}

fn empty() -> GgufBuilder {
    GgufBuilder::default()
}

/// A file with one pair and two tensors whose sizes the alignment divides, so that its last byte is data.
fn small() -> GgufBuilder {
    empty().kv("k", Raw::u32(7)).tensor(RawTensor::f32("a", &[8])).tensor(RawTensor::f32("b", &[8, 2]))
}

/// The same with one tensor of this entry in the middle.
fn with_tensor(t: RawTensor) -> GgufBuilder {
    empty().tensor(RawTensor::f32("a", &[8])).tensor(t)
}

/// A file that follows and states an alignment, with tensors that need padding for it.
fn aligned(alignment: u32) -> GgufBuilder {
    let file = GgufBuilder { alignment: alignment.into(), ..empty() };
    file.kv("general.alignment", Raw::u32(alignment))
        .tensor(RawTensor::f32("a", &[3]))
        .tensor(RawTensor::f32("b", &[5]))
}

fn cut(file: GgufBuilder, n_bytes: usize) -> Vec<u8> {
    let mut bytes = file.bytes();
    bytes.truncate(bytes.len() - n_bytes);
    bytes
}

/// Position of a one-letter first key's length, text, type and value.
const KEY: u64 = 24;
const KEY_TYPE: u64 = 33;
const VALUE: u64 = 37;
