#!/usr/bin/env bash
# Runs every fuzz target for some time, all at once, from binaries that were built before:
#   cargo +nightly fuzz build --release && fuzz/campaign.sh pack OUT.tar.xz      here
#   tar xf OUT.tar.xz && kestrel-fuzz/campaign.sh run SECONDS RESULTS            on any x86-64 Linux, no Rust needed
# RESULTS gets summary.tsv (executions, coverage, corpus and processor time of each target), last-lines.txt,
# crashes.tar.xz and corpora.tar.xz (minimised).
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
    # The binaries have most of their code in common, megabytes apart.
    tar -C "$work" -c kestrel-fuzz | xz --x86 --lzma2=preset=5,dict=256MiB >"$out"
    rm -r "$work"
    ls -l "$out"
}

# A worker per core, at least one per target; those that are left go to the targets that are named first here.
workers() {
    local name=$1 all=$2 cores first=(bnb_state checkpoint_folder gguf_model gguf_struct dequant) i
    cores=$(nproc)
    for i in "${!first[@]}"; do
        if [ "${first[i]}" = "$name" ] && [ $((cores % all)) -gt "$i" ] && [ "$cores" -gt "$all" ]; then
            echo $((cores / all + 1))
            return
        fi
    done
    echo $((cores > all ? cores / all : 1))
}

# Status lines are "#N: cov: C ft: F corp: K exec/s: E oom/timeout/crash: a/b/c ...".
summarise() {
    local name=$1 results=$2
    grep -E '^#[0-9]+: cov:' "$results/logs/$name.log" | tail -1 |
        sed -E "s|^#([0-9]+): cov: ([0-9]+) ft: ([0-9]+) corp: ([0-9]+) .*crash: ([0-9/]+).*|$name\t\1\t\2\t\3\t\4\t\5|" |
        sed "s|\$|\t$(awk '{ print int($1 + $2) }' "$results/logs/$name.cpu")|"
}

run() {
    local seconds=$1 results=$2 pids=() name targets temp
    mkdir -p "$results/crashes" "$results/logs" "$results/corpus"
    results=$(cd "$results" && pwd)
    targets=("$here"/bin/*)
    # Memory for what the targets write, if there is enough of it.
    temp=${TMPDIR:-/tmp}
    if [ "$(df --output=avail /dev/shm 2>/dev/null | tail -1)" -gt $((8 << 20)) ] 2>/dev/null; then temp=/dev/shm; fi
    TIMEFORMAT='%U %S'
    for binary in "${targets[@]}"; do
        name=$(basename "$binary")
        mkdir -p "$results/corpus/$name"
        cp -n "$here/corpus/$name"/* "$results/corpus/$name/" 2>/dev/null || true
        # Forked workers: a crash is written down and the target goes on.
        (cd "$results" && { time TMPDIR=$temp "$binary" "corpus/$name" -fork="$(workers "$name" ${#targets[@]})" \
            -ignore_crashes=1 -ignore_timeouts=1 -ignore_ooms=1 -max_total_time="$seconds" -timeout=10 \
            -rss_limit_mb=2048 -max_len=16384 -artifact_prefix="crashes/$name-" >"logs/$name.log" 2>&1; } \
            2>"logs/$name.cpu") &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || true; done
    # Fewer files that reach the same.
    pids=()
    for binary in "${targets[@]}"; do
        name=$(basename "$binary")
        mkdir -p "$results/minimised/$name"
        TMPDIR=$temp timeout 60 "$binary" -merge=1 -rss_limit_mb=4096 "$results/minimised/$name" \
            "$results/corpus/$name" >"$results/logs/$name.merge" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || true; done
    printf 'target\texecutions\tcoverage\tfeatures\tcorpus\toom/timeout/crash\tcpu_s\n' >"$results/summary.tsv"
    for binary in "${targets[@]}"; do summarise "$(basename "$binary")" "$results" >>"$results/summary.tsv"; done
    tail -n 40 "$results"/logs/*.log >"$results/last-lines.txt"
    tar -C "$results/minimised" -c . | xz -T0 -2 >"$results/corpora.tar.xz"
    tar -C "$results/crashes" -c . | xz -T0 -2 >"$results/crashes.tar.xz"
    cat "$results/summary.tsv"
    ls "$results/crashes" | head -50
    rm -rf "$results/corpus" "$results/minimised" "$results/logs" "$results/crashes"
}

case ${1:-} in
pack) pack "$2" ;;
run) run "$2" "$3" ;;
*)
    echo "usage: $0 pack OUT.tar.xz | run SECONDS RESULTS" >&2
    exit 2
    ;;
esac
