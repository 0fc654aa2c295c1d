//! A text cut into windows, as llama.cpp's tools cut it.

use kestrel_formats::{Error, ErrorKind, Result};
use kestrel_runtime::evaluate;
use kestrel_runtime::tokenizer::Tokenizer;
use std::path::Path;

/// Whole windows of a text. A rest at its end is dropped.
pub struct Windows {
    /// All of them one after the other; a multiple of `n_ctx`.
    pub tokens: Vec<u32>,
    /// Tokens of a window.
    pub n_ctx: usize,
    /// Takes the place of a window's first token where the model wants a text to begin with it.
    bos: Option<u32>,
}

impl Windows {
    /// At most `n_most` windows of the text that was read from `path`. Errors: it has none.
    pub fn of_text(
        path: &Path,
        text: &str,
        tokenizer: &Tokenizer,
        n_ctx: u32,
        n_most: Option<u32>,
    ) -> Result<Self> {
        let bos = tokenizer.prompt_bos();
        let mut tokens: Vec<u32> = bos.into_iter().collect();
        tokens.extend(tokenizer.encode(text, false)?);
        let out = Self::new(tokens, n_ctx as usize, n_most, tokenizer);
        match out.is_empty() {
            true => Err(Error::new(ErrorKind::Usage)
                .file(path)
                .expected(format!("a text of at least one window of {n_ctx} tokens"))
                .found("less")
                .hint("--ctx sets a smaller window")),
            false => Ok(out),
        }
    }

    /// At most `n_most` windows of these tokens.
    pub fn new(mut tokens: Vec<u32>, n_ctx: usize, n_most: Option<u32>, tokenizer: &Tokenizer) -> Self {
        let available = tokens.len() / n_ctx;
        tokens.truncate(n_most.map_or(available, |n| available.min(n as usize)) * n_ctx);
        Self { tokens, n_ctx, bos: tokenizer.prompt_bos() }
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.tokens.len() / self.n_ctx
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The windows, as a model reads them.
    pub fn iter(&self) -> impl Iterator<Item = Vec<u32>> {
        evaluate::windows(self.tokens.len(), self.n_ctx).map(|range| {
            let mut window = self.tokens[range].to_vec();
            if let (Some(bos), Some(first)) = (self.bos, window.first_mut()) {
                *first = bos;
            }
            window
        })
    }
}
