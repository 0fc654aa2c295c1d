//! Output files that appear complete or not at all.
