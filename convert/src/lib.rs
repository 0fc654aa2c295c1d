//! From a checkpoint or a GGUF file to a quantized GGUF file in one streaming pass: plan, read, transform,
//! quantize, write, verify. Runs no model.
