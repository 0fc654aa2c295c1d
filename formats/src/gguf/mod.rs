//! GGUF v2 and v3: reading (split files included), metadata values, and the layout of a file to be written.
//!
//! [`Gguf::open`] maps and checks a file; [`model_of`] (or [`hyperparams_from_gguf`]) checks that its tensors make a
//! model and returns the hyperparameters; [`layout`] says which bytes and places a new file has, and
//! [`architecture_metadata`] which keys describe the model in it.
//!
//! Source of the format: the GGUF specification in ggml's `docs/gguf.md`. Shapes outside this module are in
//! PyTorch order (rows, cols); ggml's reversed order exists only here.

mod cursor;
mod metadata;
mod model;
mod read;
mod tensor_table;
mod value;
mod write;

pub use metadata::{Field, Metadata, StringArray};
pub use model::{ARCHITECTURE, ModelFacts, architecture_metadata, hyperparams_from_gguf, model_of};
pub use read::{Gguf, TensorInfo, TensorView};
pub use value::{Array, Value, ValueType};
pub use write::{Layout, TensorDecl, layout};

/// Key of the architecture's name.
pub const KEY_ARCHITECTURE: &str = "general.architecture";
