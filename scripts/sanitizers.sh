#!/usr/bin/env bash
# Memory checks that need a nightly compiler: miri, address and thread (all of them without an argument). Installs the
# compiler and its components if they are missing, and fails if it cannot. Each says how long it took.
set -euo pipefail
cd "$(dirname "$0")/.."
host=$(rustc -vV | sed -n 's/^host: //p')
big_endian=s390x-unknown-linux-gnu
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")

# With its components named, rustup takes the newest nightly that has them.
has() { rustup component list --toolchain nightly --installed 2>/dev/null | grep -q "^$1"; }
if ! has miri || ! has rust-src; then
    rustup toolchain install nightly --profile minimal --component miri --component rust-src
fi
rustc +nightly --version

# Interprets the readers, the codecs and the plain kernels; undefined behaviour of any kind ends it.
miri() {
    for machine in "$host" "$big_endian"; do
        echo "miri: $machine"
        MIRIFLAGS="-Zmiri-strict-provenance -Zmiri-disable-isolation" cargo +nightly miri test --locked \
            --target "$machine" --target-dir "$target/miri" -p kestrel-tests --test in_memory
    done
}

# Instruments the SIMD kernels: the comparisons with plain Rust, the rows before untouchable pages, and the corpora.
# Leaks are not looked for: threads of the tests may still hold their buffers when the process ends.
address() {
    ASAN_OPTIONS=detect_leaks=0 RUSTFLAGS="-Zsanitizer=address" cargo +nightly test --release --locked --target "$host" \
        --target-dir "$target/address" -p kestrel-tests --test integration -- \
        same_bits exact_sizes extreme_codes guard_pages::products fuzz_corpora
}

# Instruments the pool, sequences that advance together, and converting with threads. The standard library too, or its
# own locks look like races. A race ends the program with an error.
thread() {
    local flags=(--release --locked --target "$host" -Zbuild-std --target-dir "$target/thread")
    export RUSTFLAGS="-Zsanitizer=thread"
    cargo +nightly test "${flags[@]}" -p kestrel-runtime --lib -- pool
    cargo +nightly test "${flags[@]}" -p kestrel-tests --test integration -- \
        batch:: the_bytes_do_not_depend_on_the_number_of_threads
}

for part in ${1:-miri address thread}; do
    case $part in
    miri | address | thread) ;;
    *) echo "usage: $0 [miri | address | thread]" >&2 && exit 2 ;;
    esac
    SECONDS=0
    ("$part")
    echo "$part: ${SECONDS} s"
done
