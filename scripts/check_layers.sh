#!/usr/bin/env bash
# formats <- quant <- {convert, runtime} <- cli, and `unsafe` only where ARCHITECTURE.md allows it.
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0

# The workspace crates that a crate is built from, itself left out.
below() { cargo tree --locked -p "$1" -e normal --prefix none --depth 1 | awk -v me="$1" '$1 ~ /^kestrel-/ && $1 != me {print $1}' | sort -u | tr '\n' ' '; }
expect() {
    local found; found=$(below "$1")
    if [ "$found" != "${2:+$2 }" ]; then
        echo "$1 depends on: $found(expected: $2)"; failed=1
    fi
}
expect kestrel-formats ""
expect kestrel-quant "kestrel-formats"
expect kestrel-convert "kestrel-formats kestrel-quant"
expect kestrel-runtime "kestrel-formats kestrel-quant"
expect kestrel-cli "kestrel-convert kestrel-formats kestrel-quant kestrel-runtime"

allowed='^(formats/src/map\.rs|runtime/src/pool\.rs|runtime/src/kernels/.*|tests/src/alloc_count\.rs|runtime/tests/.*|tests/tests/kernels.*)$'
for file in $(git ls-files '*.rs'); do
    if grep -qE '\bunsafe (\{|fn|impl|extern)' "$file" && ! [[ $file =~ $allowed ]]; then
        echo "$file: unsafe code outside the memory map, the kernels and the pool"; failed=1
    fi
done
for crate in formats quant convert runtime cli; do
    printf '%s: %s unsafe blocks\n' "$crate" "$(grep -rhoE '\bunsafe \{' "$crate/src" | wc -l)"
done
[ $failed = 0 ] && echo "layers hold"
exit $failed
