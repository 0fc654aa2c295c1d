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

# `unsafe` as code, comments left out. Beside the product's five places: the counting allocator and the guard pages of
# the tests. The count is what a reviewer of unsafe code has to read.
hits=$(grep -rnE '\bunsafe (\{|fn|impl|extern|trait)' --include='*.rs' formats quant convert runtime cli tests fuzz | grep -vE ':[0-9]+: *//' || true)
while IFS= read -r hit; do
    case $hit in
        formats/src/map.rs:* | runtime/src/kernels/* | runtime/src/pool.rs:* | quant/src/isa.rs:*) ;;
        quant/src/scale_search/vectors.rs:*) ;;
        tests/src/alloc_count.rs:* | tests/src/guard.rs:* | tests/tests/guard_pages.rs:* | '') ;;
        *) echo "unsafe outside its places: $hit" >&2; fail=1 ;;
    esac
done <<<"$hits"
for crate in formats quant convert runtime cli tests fuzz; do
    blocks=$(grep -cE "^$crate/[^:]*:[0-9]+:.*\bunsafe \{" <<<"$hits" || true)
    others=$(grep -cE "^$crate/[^:]*:[0-9]+:.*\bunsafe (fn|impl|extern|trait)" <<<"$hits" || true)
    echo "$crate: $blocks unsafe blocks, $others unsafe functions and impls"
done

# Every crate, tests, examples and benchmarks included: one without unsafe code forbids it, any other denies it outside
# the modules that say so. A block without its reason is denied by the workspace's lints, which every package takes.
grep -q '^undocumented_unsafe_blocks = "deny"' Cargo.toml || { echo "undocumented unsafe blocks are not denied" >&2; fail=1; }
cargo metadata --no-deps --format-version 1 --locked | python3 -c '
import json, pathlib, re, sys
failed = False
def complain(path, what):
    global failed
    failed = True
    print(f"{path}: {what}", file=sys.stderr)
forbid, deny = [], []
for package in json.load(sys.stdin)["packages"]:
    manifest = pathlib.Path(package["manifest_path"])
    if not re.search(r"^\[lints\]\nworkspace = true", manifest.read_text(), re.M):
        complain(manifest, "does not take the workspace lints")
    for target in package["targets"]:
        root = pathlib.Path(target["src_path"])
        own = root.name in ("lib.rs", "main.rs")
        sources = root.parent.rglob("*.rs") if own else [root]
        code = "\n".join(re.sub(r"//.*", "", source.read_text()) for source in sources)
        wanted = "deny" if re.search(r"\bunsafe (\{|fn|impl|extern|trait)", code) else "forbid"
        (deny if wanted == "deny" else forbid).append(package["name"] + ":" + target["name"])
        if f"#![{wanted}(unsafe_code)]" not in root.read_text():
            complain(root, f"does not {wanted} unsafe code")
print("unsafe code is forbidden in", ", ".join(forbid))
print("unsafe code is denied, but in some modules, in", ", ".join(deny))
sys.exit(failed)' || fail=1

exit $fail
