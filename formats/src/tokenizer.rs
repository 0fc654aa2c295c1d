//! Tokenizer data.
