#!/usr/bin/env bash
# From a log of who touched what and when to a judged ranker: prepare, train, score the test requests, judge. Stopped at any
# moment (a full disk, a lost machine, Ctrl-C) and run again with the same settings, it goes on where it stopped, and ends
# with the same figures.
#   recipes/pipelines/ranker.sh [OUT]        or: make pipe-ranker
# DATA (a log for longer-prep; default: a made-up one of 80 people, see log.py), PREP (further options of longer-prep),
# TRAIN (of longer-train), and LAUNCH (-j 2, or --accelerate FILE; for training) may be set.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-demo/ranker}
read -ra prep <<< "${PREP:-}"
read -ra train <<< "${TRAIN:---max-len 64 --merge 4 --queries 40% --batch-requests 32 --epochs 3 --lr 3e-3}"
read -ra launch <<< "${LAUNCH:-}"
mkdir -p "$out"

# What a step writes takes its name when it is whole: a file that is there is finished.
whole() { cat > "$1.part" && mv "$1.part" "$1"; }

log=${DATA:-$out/log.jsonl}
if [ -z "${DATA:-}" ]; then
    [ -e "$log" ] || python3 "$here/log.py" | whole "$log"
    prep=(--side cat "${prep[@]}")
fi
[ -d "$out/data" ] || longer-prep "$log" "${prep[@]}" --out "$out/data" > "$out/data.json"
longer-train "$out/data" --out "$out/model" --resume "${train[@]}" "${launch[@]}" > "$out/events.jsonl"
[ -e "$out/scored.jsonl" ] || longer-score --model "$out/model" --data "$out/data" --split test | whole "$out/scored.jsonl"
[ -e "$out/figures.json" ] || longer-eval --bootstrap 1000 "$out/scored.jsonl" | whole "$out/figures.json"
cat "$out/figures.json"
