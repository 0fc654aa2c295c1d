//! ChatML, the format of the instruct models: `<|im_start|>ROLE\nTEXT<|im_end|>\n`. Other templates are not run.

use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::tokenizer::Tokenizer;

/// The tokens of one user message and of the beginning of the answer. Only the markers are read as special tokens: a
/// message cannot end its own turn.
pub fn user_turn(tokenizer: &Tokenizer, message: &str) -> Result<Vec<u32>> {
    let mut tokens = tokenizer.encode("<|im_start|>user\n", true)?;
    let start = tokenizer.encode("<|im_start|>", true)?;
    let end = tokenizer.encode("<|im_end|>", true)?;
    if start.len() != 1 || end.len() != 1 {
        return Err(Error::new(ErrorKind::Unsupported)
            .what("--chat")
            .expected("a model with the ChatML tokens <|im_start|> and <|im_end|>")
            .found("a vocabulary without them")
            .hint("write the model's own markers into the text and leave --chat out"));
    }
    tokens.extend(tokenizer.encode(message, false)?);
    tokens.extend(tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", true)?);
    Ok(tokens)
}
