//! Arithmetic between a checkpoint and a GGUF file.
