#!/usr/bin/env bash
# Builds the binary for aarch64 and runs the kernels' tests under qemu, NEON included.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-gcc >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user >/dev/null
fi
rustup target add aarch64-unknown-linux-gnu
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
cargo build --locked --target aarch64-unknown-linux-gnu -p kestrel-cli
KESTREL_REQUIRE_ISA=scalar,neon cargo test --locked --target aarch64-unknown-linux-gnu \
    -p kestrel-tests --test integration -- kernels::
