//! Progress bars on stderr; none if stderr is no terminal.

use crate::output;
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

    /// Shows `done` of `total` bytes.
    pub fn set(&self, doing: &'static str, done: u64, total: u64) {
        if self.0.length() != Some(total) {
            self.0.set_prefix(doing);
            self.0.set_length(total);
        }
        self.0.set_position(done);
    }
}

/// A bar for things that are alike, such as windows of a text: how many are done, and the time left.
pub struct Count(ProgressBar);

impl Count {
    /// A bar for `n` things called `what`, of which `done` are done.
    pub fn new(what: &str, n: usize, done: usize) -> Self {
        let style = ProgressStyle::with_template(&format!(
            "{{pos}}/{{len}} {what} [{{bar:30}}] {{eta}} left {{wide_msg}}"
        ))
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(n as u64), ProgressDrawTarget::stderr());
        bar.set_style(style.progress_chars("=> "));
        let bar = bar.with_position(done as u64);
        bar.reset_eta();
        Self(bar)
    }

    /// `n` more are done. `status` says how it stands; where no bar is drawn it is a note.
    pub fn advance(&self, n: usize, status: &str) {
        self.0.inc(n as u64);
        match self.0.is_hidden() {
            false => self.0.set_message(status.to_owned()),
            true => {
                let (at, n) = (self.0.position(), self.0.length().unwrap_or(0));
                output::note(&format!("{at}/{n}, {:.0?} left: {status}", self.0.eta()));
            }
        }
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A bar for steps of work: which one is at hand, how many are left, and the time that went by.
pub struct Steps(ProgressBar);

impl Steps {
    /// A bar for so many steps.
    pub fn new(n_steps: usize) -> Self {
        let style = ProgressStyle::with_template("{elapsed:>10} [{bar:30}] {pos}/{len} {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(n_steps as u64), ProgressDrawTarget::stderr());
        bar.set_style(style.progress_chars("=> "));
        Self(bar)
    }

    /// Does one step.
    pub fn step<R>(&self, doing: impl Into<String>, work: impl FnOnce() -> R) -> R {
        self.0.set_message(doing.into());
        let result = work();
        self.0.inc(1);
        result
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Progress for Bar {
    fn phase(&self, phase: Phase, read_bytes: u64, _write_bytes: u64) {
        self.0.set_prefix(match phase {
            Phase::Convert => "converting",
            Phase::Check => "checking",
            Phase::Verify => "verifying",
        });
        self.0.set_message("");
        self.0.set_length(read_bytes);
        self.0.reset();
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
