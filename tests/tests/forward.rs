//! The runtime's forward pass against transformers in float32.

/// Largest allowed |logit - golden| / max |golden logit of that position|.
pub const TOLERANCE: f64 = 2e-4;
