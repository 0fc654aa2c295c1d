//! One integration crate; each module is an area.
#![allow(missing_docs)]

mod batch;
mod bitsandbytes;
mod codecs;
mod convert;
mod forward;
mod fuzz_corpora;
mod gguf_files;
mod guard_pages;
mod kernels;
mod measuring;
mod peers_formats;
mod quality;
mod reference;
mod tokenizer;
mod traps;

/// Counts, so that the readers' tests can bound what a file makes them allocate.
#[global_allocator]
static ALLOCATOR: kestrel_tests::alloc_count::CountingAllocator =
    kestrel_tests::alloc_count::CountingAllocator;
