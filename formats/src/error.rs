//! The one error type of the workspace: what went wrong, where, what was expected and what was found.

use std::fmt;
use std::path::{Path, PathBuf};

/// Shorthand used by every crate of the workspace.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation failed. The name is stable: `--error-format json` prints it and tests compare it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The command line, or a caller's option, makes no sense.
    Usage,
    /// The file does not start with the magic number of its format.
    BadMagic,
    /// The format's version is not one that is read.
    UnsupportedVersion,
    /// The file was written on a big-endian machine.
    BigEndian,
    /// The file ends before what it announces.
    Truncated,
    /// A count or a length in the file is larger than the file could hold.
    CountExceedsFile,
    /// Tensor data lies outside the file.
    DataOutOfBounds,
    /// Tensor data is misaligned, overlaps another tensor or leaves a gap.
    BadOffset,
    /// `general.alignment` is not a supported power of two.
    BadAlignment,
    /// A key or a name is empty, too long, not UTF-8 or otherwise malformed.
    BadName,
    /// The same key or name occurs twice.
    Duplicate,
    /// A value has another type than the format or the architecture asks for.
    WrongType,
    /// A type id or dtype that the format does not define.
    UnknownType,
    /// A type that ggml once had and removed.
    RemovedType,
    /// Known, but not supported here; the message says what is.
    Unsupported,
    /// A number of dimensions, a dimension or a product of them is impossible.
    BadShape,
    /// A required key, tensor or file is absent.
    Missing,
    /// Something present that must not be there.
    Unexpected,
    /// A value is outside its valid range.
    OutOfRange,
    /// Two statements of the input contradict each other.
    Inconsistent,
    /// Text that is not valid JSON, or JSON of the wrong structure.
    BadJson,
    /// A path in the input leaves the folder it belongs to.
    BadPath,
    /// The path is a folder, a pipe, a device or a socket.
    NotRegularFile,
    /// A Python pickle or PyTorch archive, which is refused unread.
    PickleRefused,
    /// A git-lfs pointer stands where the file should be.
    LfsPointer,
    /// A weight or scale is NaN or infinite.
    NotFinite,
    /// A tokenizer that this project does not implement.
    UnsupportedTokenizer,
    /// A chat template that does not render.
    BadTemplate,
    /// A tensor differs from its source by more than its type allows.
    VerifyFailed,
    /// The output exists and `--force` was not given.
    OutputExists,
    /// The operating system reported an error.
    Io,
    /// The input changed while it was read.
    Changed,
    /// A limit on size, count or memory was reached.
    Limit,
    /// The user interrupted the run.
    Interrupted,
}

impl ErrorKind {
    /// The exit status of the command line for this kind: 2 bad input or usage, 3 I/O, 4 a resource limit,
    /// 130 interrupted.
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Io | Self::Changed => 3,
            Self::Limit => 4,
            Self::Interrupted => 130,
            _ => 2,
        }
    }
}

/// An error with its place. Built in the order it reads:
/// `Error::new(kind).file(path).at(offset).what("tensor \"x\"").expected("...").found("...")`.
#[derive(Clone, Debug)]
pub struct Error(Box<Details>);

/// The parts of an [`Error`], public for tests and for the JSON form.
#[derive(Clone, Debug)]
pub struct Details {
    /// Stable reason.
    pub kind: ErrorKind,
    /// The file concerned.
    pub file: Option<PathBuf>,
    /// Byte offset in that file.
    pub offset: Option<u64>,
    /// Tensor, key or field concerned.
    pub what: Option<String>,
    /// What would have been right.
    pub expected: Option<String>,
    /// What was there.
    pub found: Option<String>,
    /// What the user can do about it.
    pub hint: Option<String>,
}

impl Error {
    /// An error of this kind with no details yet.
    pub fn new(kind: ErrorKind) -> Self {
        Self(Box::new(Details {
            kind,
            file: None,
            offset: None,
            what: None,
            expected: None,
            found: None,
            hint: None,
        }))
    }

    /// An operating-system error on `path`.
    pub fn io(path: &Path, doing: &str, source: impl Into<std::io::Error>) -> Self {
        Self::new(ErrorKind::Io).file(path).what(doing).found(source.into())
    }

    /// Names the file, unless an inner layer already did.
    pub fn file(mut self, path: &Path) -> Self {
        self.0.file.get_or_insert_with(|| path.to_owned());
        self
    }

    /// Names the byte offset.
    pub fn at(mut self, offset: u64) -> Self {
        self.0.offset = Some(offset);
        self
    }

    /// Names the tensor, key or field.
    pub fn what(mut self, what: impl fmt::Display) -> Self {
        self.0.what = Some(what.to_string());
        self
    }

    /// Says what would have been right.
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.0.expected = Some(expected.to_string());
        self
    }

    /// Says what was there.
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.0.found = Some(found.to_string());
        self
    }

    /// Says what the user can do.
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.0.hint = Some(hint.to_string());
        self
    }

    /// The reason.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// All parts.
    pub fn details(&self) -> &Details {
        &self.0
    }

    /// The same parts as one JSON object, for `--error-format json`.
    pub fn to_json(&self) -> serde_json::Value {
        let d = &self.0;
        serde_json::json!({
            "kind": format!("{:?}", d.kind),
            "file": d.file.as_ref().map(|p| p.display().to_string()),
            "offset": d.offset,
            "what": d.what,
            "expected": d.expected,
            "found": d.found,
            "hint": d.hint,
            "exit_status": d.kind.exit_status(),
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = &self.0;
        if let Some(file) = &d.file {
            write!(f, "{}: ", file.display())?;
        }
        match &d.what {
            Some(what) => write!(f, "{what}: {:?}", d.kind)?,
            None => write!(f, "{:?}", d.kind)?,
        }
        if let Some(offset) = d.offset {
            write!(f, " at byte {offset}")?;
        }
        match (&d.expected, &d.found) {
            (Some(e), Some(g)) => write!(f, ": expected {e}, found {g}")?,
            (Some(e), None) => write!(f, ": expected {e}")?,
            (None, Some(g)) => write!(f, ": {g}")?,
            (None, None) => {}
        }
        if let Some(hint) = &d.hint {
            write!(f, " ({hint})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
