//! Measures of quantization error.
