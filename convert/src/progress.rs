//! What a run tells its caller while it works. This crate prints nothing itself.

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading, quantizing and writing, all at once.
    Convert,
    /// Waiting for the disk, then reading the output back.
    Check,
    /// Comparing a finished file with its source.
    Verify,
}

/// Receives progress from several threads at once. Every method does nothing unless overridden.
pub trait Progress: Sync {
    /// A phase begins that will read and write this many bytes.
    fn phase(&self, phase: Phase, read_bytes: u64, write_bytes: u64) {
        let _ = (phase, read_bytes, write_bytes);
    }

    /// Work on a tensor begins. Tensors come in source order and may overlap.
    fn tensor(&self, name: &str) {
        let _ = name;
    }

    /// So many more bytes were read and written.
    fn bytes(&self, read: u64, written: u64) {
        let _ = (read, written);
    }
}

/// No progress wanted.
impl Progress for () {}
