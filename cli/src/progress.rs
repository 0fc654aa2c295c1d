//! Progress bars on stderr; none if stderr is no terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kestrel_convert::{Phase, Progress};

/// A bar for bytes: what is being done, share, rate, time left, and the tensor at hand.
pub struct Bar(ProgressBar);

impl Bar {
    /// An empty bar, not drawn before its first phase.
    pub fn new() -> Self {
        let template = "{prefix:>10} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} \
                        {decimal_bytes_per_sec} {eta} {wide_msg}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        bar.set_style(style.progress_chars("=> "));
        Self(bar)
    }

    /// Starts over with `n_bytes` to go.
    pub fn start(&self, doing: &'static str, n_bytes: u64) {
        self.0.reset();
        self.0.set_length(n_bytes);
        self.0.set_prefix(doing);
        self.0.set_message("");
    }

    /// Moves to `n_bytes`.
    pub fn set(&self, n_bytes: u64) {
        self.0.set_position(n_bytes);
    }
}

impl Progress for Bar {
    fn phase(&self, phase: Phase, read_bytes: u64, _write_bytes: u64) {
        let doing = match phase {
            Phase::Convert => "converting",
            Phase::Check => "checking",
            Phase::Verify => "verifying",
        };
        self.start(doing, read_bytes);
    }

    fn tensor(&self, name: &str) {
        self.0.set_message(name.to_owned());
    }

    fn bytes(&self, read: u64, _written: u64) {
        self.0.inc(read);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
