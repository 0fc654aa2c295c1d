//! One integration crate; each module is an area.
#![allow(missing_docs)]

mod batch;
mod bitsandbytes;
mod checkpoint_malformed;
mod codecs;
mod convert;
mod forward;
mod gguf_files;
mod gguf_malformed;
mod kernels;
mod peers_formats;
mod quality;
mod reference;
mod tokenizer;
mod traps;

/// Counts, so that the readers' tests can bound what a file makes them allocate.
#[global_allocator]
static ALLOCATOR: kestrel_tests::alloc_count::CountingAllocator =
    kestrel_tests::alloc_count::CountingAllocator;
