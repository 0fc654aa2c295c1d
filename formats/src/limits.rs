//! Every cap on a number that comes from a file, with its reason. Readers take limits from here and nowhere else.

/// Key-value pairs in a GGUF header. Falcon Mamba files have about 40.
pub const GGUF_KV_MAX: u64 = 65_536;
/// Tensors in one file. Falcon Mamba 7B has 643.
pub const TENSORS_MAX: u64 = 65_536;
/// Bytes of a GGUF key, from the GGUF specification.
pub const GGUF_KEY_BYTES_MAX: u64 = 65_535;
/// Bytes of one metadata string; the longest real one is a chat template of a few KiB.
pub const GGUF_STRING_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a GGUF tensor name; ggml stores 64 with the terminating NUL.
pub const GGUF_TENSOR_NAME_BYTES_MAX: u64 = 63;
/// Dimensions of a GGUF tensor, ggml's own limit.
pub const GGUF_DIMS_MAX: u32 = 4;
/// `general.alignment`; larger values serve only to overflow sums.
pub const GGUF_ALIGNMENT_MAX: u32 = 1 << 20;
/// Bytes of all GGUF metadata together.
pub const GGUF_METADATA_BYTES_MAX: u64 = 256 << 20;
/// Files of a split GGUF.
pub const GGUF_SPLIT_MAX: u32 = 1024;
/// Bytes of a safetensors header. The format allows 100 MB; 8192 tensors need less than this.
pub const SAFETENSORS_HEADER_BYTES_MAX: u64 = 16 << 20;
/// Tensors of a checkpoint, in one safetensors file or in its index. Falcon Mamba 7B has 2,193 if bitsandbytes quantized it,
/// scales included; 65,536 entries would take several times the bytes of their text.
pub const CHECKPOINT_TENSORS_MAX: u64 = 8192;
/// Tensors in one safetensors file that the model cannot have, before the rest of the file is not looked at.
pub const SAFETENSORS_UNKNOWN_MAX: u64 = 64;
/// Dimensions of a safetensors tensor.
pub const SAFETENSORS_DIMS_MAX: usize = 8;
/// Bytes of a safetensors tensor name.
pub const SAFETENSORS_NAME_BYTES_MAX: usize = 1024;
/// Bytes of config.json and its small siblings.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// Bytes of model.safetensors.index.json.
pub const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Fields of model.safetensors.index.json; it has two.
pub const INDEX_FIELDS_MAX: usize = 64;
/// Bytes of tokenizer.json; Falcon's with list merges is 4.6 MB.
pub const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
/// Nesting of any JSON that is read.
pub const JSON_DEPTH_MAX: usize = 64;
/// Memory that the values of a JSON text may take beside as many bytes as the text has. Those of a config.json
/// take some 10 KiB.
pub const JSON_HEAP_BYTES: u64 = 640 << 10;
/// Tokens in a vocabulary.
pub const VOCAB_MAX: u64 = 4 << 20;
/// Merges of a BPE tokenizer.
pub const MERGES_MAX: u64 = 4 << 20;
/// Bytes of one token.
pub const TOKEN_BYTES_MAX: usize = 64 << 10;
/// Layers of a model; llama.cpp's limit is 512.
pub const LAYERS_MAX: u64 = 1024;
/// Any width of a model (d_model, d_inner, dt_rank).
pub const WIDTH_MAX: u64 = 1 << 20;
/// d_state; published models have 8 to 128.
pub const D_STATE_MAX: u64 = 1024;
/// d_conv; published models have 4.
pub const D_CONV_MAX: u64 = 64;
/// Safetensors files of one checkpoint; each stays open.
pub const SHARDS_MAX: u64 = 512;
/// Bytes of an importance matrix. That of a 70B model has 100 MB; ours have about 10.
pub const IMATRIX_BYTES_MAX: u64 = 1 << 30;
/// Bytes of the JSON in a bitsandbytes quant state; the library writes about 170.
pub const QUANT_STATE_BYTES_MAX: u64 = 4096;
/// Block sizes that bitsandbytes quantizes with.
pub const BNB_BLOCKSIZES: [u64; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];
