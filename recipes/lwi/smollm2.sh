#!/usr/bin/env bash
# The embedded language model is relabelled at random, found again, and averaged with itself: nothing is lost. The same
# average without matching is noise. About three minutes and 2 GB of disk.
#   recipes/lwi/smollm2.sh [OUT]        or: make lwi-smollm2
set -euo pipefail
out=${1:-demo/lwi}
mkdir -p "$out"
lwi-fuse smollm2 smollm2 --shuffle-seed 1 --groups . --no-diversion --overwrite --plot "$out/back.svg" \
    --report "$out/back.jsonl" -o "$out/back" | tail -n 1
lwi-fuse smollm2 smollm2 --shuffle-seed 1 --groups . --matching identity --overwrite -o "$out/mixed" | tail -n 1
for model in "$out/back" "$out/mixed"; do
    echo '{"prompt": "The capital of France is"}' | lm-generate --model "$model" --raw --max-new-tokens 12 |
        jq -c '{model, completion}'
done
