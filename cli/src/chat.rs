//! One turn of a chat, as the model wants it written: by the chat template that it brings, or in ChatML
//! (`<|im_start|>ROLE\nTEXT<|im_end|>\n`) if it brings none or one that does not render.

use crate::output;
use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::Model;
use kestrel_runtime::chat::{Conversation, Message, render};
use kestrel_runtime::tokenizer::Tokenizer;

/// The tokens of one user message and of the beginning of the answer. Only the markers around the message are read as
/// special tokens: a message cannot end its own turn.
pub fn user_turn(model: &Model, tokenizer: &Tokenizer, message: &str) -> Result<Vec<u32>> {
    let Some(template) = model.tokenizer_data().and_then(|t| t.chat_template.as_deref()) else {
        return chatml(tokenizer, message);
    };
    match around_message(model, template) {
        Ok(texts) => {
            let mut tokens = Vec::new();
            for (i, text) in texts.iter().enumerate() {
                if i > 0 {
                    tokens.extend(tokenizer.encode(message, false)?);
                }
                tokens.extend(tokenizer.encode(text, true)?);
            }
            Ok(tokens)
        }
        Err(e) => {
            let tokens = chatml(tokenizer, message).map_err(|_| e.clone().file(model.path()))?;
            output::warnings(model.path(), &[format!("{e}; ChatML is used instead")]);
            Ok(tokens)
        }
    }
}

fn chatml(tokenizer: &Tokenizer, message: &str) -> Result<Vec<u32>> {
    let mut tokens = tokenizer.encode("<|im_start|>user\n", true)?;
    let start = tokenizer.encode("<|im_start|>", true)?;
    let end = tokenizer.encode("<|im_end|>", true)?;
    if start.len() != 1 || end.len() != 1 {
        return Err(Error::new(ErrorKind::Unsupported)
            .what("--chat")
            .expected("a model with a chat template or the ChatML tokens <|im_start|> and <|im_end|>")
            .found("neither")
            .hint("write the model's own markers into the text and leave --chat out"));
    }
    tokens.extend(tokenizer.encode(message, false)?);
    tokens.extend(tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", true)?);
    Ok(tokens)
}

/// What the template writes before and after the message, which it gets to see only as a placeholder.
fn around_message(model: &Model, template: &str) -> Result<Vec<String>> {
    let text_of = |id: Option<u32>| {
        let bytes = id.and_then(|id| model.tokenizer_data()?.tokens.get(id as usize));
        bytes.map(|b| String::from_utf8_lossy(b).into_owned()).unwrap_or_default()
    };
    let ids = model.tokenizer_data();
    let placeholder =
        (0u32..).map(|i| format!("\u{e000}message {i}\u{e001}")).find(|p| !template.contains(p));
    let placeholder = placeholder.unwrap_or_default();
    let rendered = render(
        template,
        &Conversation {
            messages: &[Message { role: "user", content: &placeholder }],
            bos_token: &text_of(ids.and_then(|t| t.bos)),
            eos_token: &text_of(ids.and_then(|t| t.eos.first().copied())),
        },
    )?;
    let texts: Vec<String> = rendered.split(&placeholder).map(str::to_owned).collect();
    if texts.len() < 2 {
        return Err(Error::new(ErrorKind::BadTemplate)
            .what("chat template")
            .expected("a text with the message in it")
            .found("one without"));
    }
    Ok(texts)
}
