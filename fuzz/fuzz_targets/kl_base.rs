#![no_main]

#[global_allocator]
static ALLOCATOR: kestrel_tests::alloc_count::CountingAllocator =
    kestrel_tests::alloc_count::CountingAllocator;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kestrel_tests::fuzz::kl_base(bytes));
