#!/usr/bin/env bash
# Runs every fuzz target for some time, all at once, from binaries that were built before:
#   cargo +nightly fuzz build --release && fuzz/campaign.sh pack OUT.tar.xz      here
#   tar xf OUT.tar.xz && kestrel-fuzz/campaign.sh run SECONDS RESULTS            on any x86-64 Linux, no Rust needed
# RESULTS gets summary.tsv (executions, coverage and corpus of each target), crashes/ and corpora.tar.xz. Each target
# gets as many processes as the machine has cores per target, at least one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

pack() {
    local out=$1 work
    work=$(mktemp -d)
    mkdir "$work/kestrel-fuzz" "$work/kestrel-fuzz/bin"
    cp "$here/campaign.sh" "$work/kestrel-fuzz/"
    cp -r "$here/corpus" "$work/kestrel-fuzz/"
    for target in "$here"/fuzz_targets/*.rs; do
        name=$(basename "$target" .rs)
        strip -o "$work/kestrel-fuzz/bin/$name" "$here/target/x86_64-unknown-linux-gnu/release/$name"
    done
    tar -C "$work" -c kestrel-fuzz | xz -T0 -6 >"$out"
    rm -r "$work"
    ls -l "$out"
}

run() {
    local seconds=$1 results=$2 jobs pids=() name targets
    mkdir -p "$results/crashes" "$results/logs" "$results/corpus"
    results=$(cd "$results" && pwd)
    targets=("$here"/bin/*)
    jobs=$(($(nproc) / ${#targets[@]}))
    [ "$jobs" -ge 1 ] || jobs=1
    for binary in "${targets[@]}"; do
        name=$(basename "$binary")
        mkdir -p "$results/corpus/$name"
        cp -n "$here/corpus/$name"/* "$results/corpus/$name/" 2>/dev/null || true
        # Forked workers: a crash is written down and the target goes on.
        (cd "$results" && TMPDIR=${TMPDIR:-/dev/shm} "$binary" "corpus/$name" -fork="$jobs" -ignore_crashes=1 \
            -ignore_timeouts=1 -ignore_ooms=1 -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
            -max_len=16384 -artifact_prefix="crashes/$name-" >"logs/$name.log" 2>&1) &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || true; done
    printf 'target\texecutions\tcoverage\tfeatures\tcorpus\tcrashes\n' >"$results/summary.tsv"
    for binary in "${targets[@]}"; do
        name=$(basename "$binary")
        # The last status line: "#N: cov: C ft: F corp: K exec/s: E oom/timeout/crash: a/b/c ...".
        grep -E '^#[0-9]+: cov:' "$results/logs/$name.log" | tail -1 |
            sed -E "s|^#([0-9]+): cov: ([0-9]+) ft: ([0-9]+) corp: ([0-9]+) .*crash: ([0-9/]+).*|$name\t\1\t\2\t\3\t\4\t\5|" \
                >>"$results/summary.tsv" || true
        # Fewer files that reach the same.
        mkdir -p "$results/minimised/$name"
        timeout 60 "$binary" -merge=1 -rss_limit_mb=4096 "$results/minimised/$name" "$results/corpus/$name" \
            >/dev/null 2>&1 || true
    done
    tail -n 40 "$results"/logs/*.log >"$results/last-lines.txt"
    tar -C "$results/minimised" -c . | xz -T0 -6 >"$results/corpora.tar.xz"
    tar -C "$results/crashes" -c . | xz -T0 -6 >"$results/crashes.tar.xz"
    rm -rf "$results/corpus" "$results/minimised" "$results/logs"
    cat "$results/summary.tsv"
    ls "$results/crashes" | head -50
}

case ${1:-} in
pack) pack "$2" ;;
run) run "$2" "$3" ;;
*)
    echo "usage: $0 pack OUT.tar.xz | run SECONDS RESULTS" >&2
    exit 2
    ;;
esac
