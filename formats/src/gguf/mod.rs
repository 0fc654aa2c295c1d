//! GGUF v2 and v3: reading (split files included), metadata values, and the layout of a file to be written.
//!
//! Source of the format: the GGUF specification in ggml's `docs/gguf.md`. Shapes outside this module are in
//! PyTorch order (rows, cols); ggml's reversed order exists only here.

mod metadata;
mod read;
mod write;

pub use metadata::{Metadata, StringArray, Value};
pub use read::{Gguf, TensorInfo, TensorView};
pub use write::{Layout, TensorDecl, layout};
