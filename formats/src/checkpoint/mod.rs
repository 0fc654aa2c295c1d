//! Checkpoint folder.
