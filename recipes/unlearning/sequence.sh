#!/usr/bin/env bash
# Successive requests: three people are forgotten one after another, each time from the model that the last request left.
# After each one the extraction strength of all requests so far is measured.
#   recipes/unlearning/sequence.sh FOLDER [OUT]        or: make unlearn-sequence DATA=FOLDER
# FOLDER holds forget.json[.gz] with a field task_id (1, 2, 3 ...) and neighbor.json[.gz], as in
# github.com/sail-sg/closer-look-LLM-unlearning. Six rows of each person and twelve neighbours are used.
set -euo pipefail
data=${1:?the folder with forget.json[.gz] and neighbor.json[.gz]}
out=${2:-demo/sequence}
mkdir -p "$out"
rows() { if [ -e "$data/$1.json.gz" ]; then zcat "$data/$1.json.gz"; else cat "$data/$1.json"; fi; }
head_of() { { cat || true; } | sed -n "1,$1p"; }

for t in 1 2 3; do
    rows forget | jq -c "select(.task_id == $t) | {question, answer}" | head_of 6 > "$out/request$t.jsonl"
done
rows neighbor | jq -c '{question, answer}' | head_of 12 > "$out/neighbours.jsonl"
cat "$out"/request[123].jsonl "$out/neighbours.jsonl" |
    lm-tune --model smollm2 --out "$out/m0" --overwrite --epochs 6 --batch-size 8 --lr 2e-4 --weight-decay 0 --quiet \
        > "$out/m0.jsonl"

for t in 1 2 3; do
    watch=()
    for earlier in $(seq 1 $((t - 1))); do watch+=(--watch "request$earlier=$out/request$earlier.jsonl"); done
    gru-unlearn --model "$out/m$((t - 1))" --forget - --retain "$out/neighbours.jsonl" "${watch[@]}" --objective satimp \
        --epochs 4 --batch-size 6 --weight-decay 0 --eval-every 0 --out "$out/m$t" --overwrite --quiet \
        < "$out/request$t.jsonl" > "$out/m$t.jsonl"
    tail -n 1 "$out/m$t.jsonl" |
        jq -c "{request: $t, forget: .after | del(.retain) | map_values(.es), retain: .after.retain.es}"
done | tee "$out/sequence.jsonl"
