#!/usr/bin/env bash
# The dependency direction, formats <- quant <- {convert, runtime} <- cli, and where `unsafe` and printing may stand.
set -euo pipefail
cd "$(dirname "$0")/.."
fail=0

# Direct dependencies on crates of ours, dev-dependencies left out.
expect() {
    local crate=$1 wanted=$2 got
    got=$(cargo metadata --no-deps --format-version 1 --locked | python3 -c '
import json, sys
for p in json.load(sys.stdin)["packages"]:
    if p["name"] == sys.argv[1]:
        print(" ".join(sorted(d["name"] for d in p["dependencies"] if d["kind"] is None and d["name"].startswith("kestrel-"))))' "$crate")
    if [ "$got" != "$wanted" ]; then
        echo "$crate depends on [$got], expected [$wanted]" >&2
        fail=1
    fi
}
expect kestrel-formats ""
expect kestrel-quant "kestrel-formats"
expect kestrel-convert "kestrel-formats kestrel-quant"
expect kestrel-runtime "kestrel-formats kestrel-quant"
expect kestrel-tests "kestrel-convert kestrel-formats kestrel-quant kestrel-runtime"

# `unsafe` as code, comments left out. Beside the product's four places: the counting allocator and the guard pages of
# the tests. The count is what a reviewer of unsafe code has to read.
hits=$(grep -rnE '\bunsafe (\{|fn|impl|extern|trait)' --include='*.rs' formats quant convert runtime cli tests fuzz | grep -vE ':[0-9]+: *//' || true)
while IFS= read -r hit; do
    case $hit in
        formats/src/map.rs:* | runtime/src/kernels/* | runtime/src/pool.rs:* | quant/src/isa.rs:*) ;;
        tests/src/alloc_count.rs:* | tests/src/guard.rs:* | tests/tests/guard_pages.rs:* | '') ;;
        *) echo "unsafe outside its places: $hit" >&2; fail=1 ;;
    esac
done <<<"$hits"
for crate in formats quant convert runtime cli tests; do
    blocks=$(grep -cE "^$crate/[^:]*:[0-9]+:.*\bunsafe \{" <<<"$hits" || true)
    others=$(grep -cE "^$crate/[^:]*:[0-9]+:.*\bunsafe (fn|impl|extern|trait)" <<<"$hits" || true)
    echo "$crate: $blocks unsafe blocks, $others unsafe functions and impls"
done

exit $fail
