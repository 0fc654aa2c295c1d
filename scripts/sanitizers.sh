#!/usr/bin/env bash
# Memory checks that need a nightly compiler: miri, address and thread (all of them without an argument). Installs the
# compiler's components if they are missing, and fails if it cannot.
set -euo pipefail
cd "$(dirname "$0")/.."
host=$(rustc -vV | sed -n 's/^host: //p')
big_endian=s390x-unknown-linux-gnu

rustup toolchain list | grep -q ^nightly || rustup toolchain install nightly --profile minimal
for component in miri rust-src; do
    rustup component list --toolchain nightly --installed | grep -q "^$component" ||
        rustup component add --toolchain nightly "$component"
done
rustc +nightly --version

# Interprets the readers, the codecs and the plain kernels; undefined behaviour of any kind ends it.
miri() {
    export MIRIFLAGS="-Zmiri-strict-provenance -Zmiri-disable-isolation"
    for target in "$host" "$big_endian"; do
        echo "miri: $target"
        cargo +nightly miri test --locked --target "$target" -p kestrel-tests --test in_memory
    done
}

# Instruments the SIMD kernels: the comparisons with plain Rust, and the rows before untouchable pages.
address() {
    RUSTFLAGS="-Zsanitizer=address" cargo +nightly test --release --locked --target "$host" \
        --target-dir "${CARGO_TARGET_DIR:-target}/address" -p kestrel-tests --test integration -- \
        same_bits exact_sizes extreme_codes guard_pages::products fuzz_corpora
}

# Instruments the pool and everything that runs on threads: converting, verifying, generating. The standard library too,
# or its own locks look like races. A race ends the program with an error.
thread() {
    local flags=(--release --locked --target "$host" -Zbuild-std --target-dir "${CARGO_TARGET_DIR:-target}/thread")
    local kestrel="${CARGO_TARGET_DIR:-target}/thread/$host/release/kestrel" folder source=tests/data/tiny-falcon-mamba
    export RUSTFLAGS="-Zsanitizer=thread"
    cargo +nightly test "${flags[@]}" -p kestrel-runtime --lib -- pool chat::tests::published
    cargo +nightly build "${flags[@]}" -p kestrel-cli
    folder=$(mktemp -d)
    "$kestrel" convert "$source" -o "$folder/m.gguf" --type q4_k_m --threads 4
    "$kestrel" verify "$folder/m.gguf" --source "$source" --threads 4 >/dev/null
    "$kestrel" run "$folder/m.gguf" -p "It was the best of times, it was the worst of times" -n 8 --temp 0 --threads 4
    rm -r "$folder"
}

case ${1:-all} in
all) miri && address && thread ;;
miri | address | thread) "$1" ;;
*) echo "usage: $0 [miri | address | thread]" >&2 && exit 2 ;;
esac
