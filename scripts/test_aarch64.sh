#!/usr/bin/env bash
# Builds the binary for aarch64 and runs the kernels' tests and those of bitsandbytes' types under qemu; NEON must have run.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
cargo build --release --locked --target aarch64-unknown-linux-gnu -p kestrel-cli -p kestrel-tests --bin kestrel
KESTREL_REQUIRE_ISA=scalar,neon cargo test --release --locked --target aarch64-unknown-linux-gnu \
    -p kestrel-cli -p kestrel-tests --test integration -- kernels:: bitsandbytes::neon
