#!/usr/bin/env bash
# Questions to pictures: paths sampled by a model under two wordings, scored, drawn a wording.
#   recipes/landscape/aqua.sh AQUA.jsonl.gz [OUT] [QUESTIONS] [PATHS] [TOKENS] [MODEL]
#   or: make landscape-lot DATA=AQUA.jsonl.gz
# The embedded model samples poor paths: this shows the pipe. The paper's size is 50 questions, 10 paths, on a GPU.
set -euo pipefail
data=${1:?a file of multiple-choice questions}
out=${2:-demo/landscape-lot}
mkdir -p "$out"
lot-data mcq "$data" --limit "${3:-3}" |
    lot-prompt --variant cot,lot2 |
    lm-generate --model "${6:-smollm2}" --n "${4:-2}" --temperature 1 --max-new-tokens "${5:-64}" \
        --log "$out/responses.jsonl" --resume > "$out/paths.jsonl"
landscape-plot --recipe "$(dirname "$0")/aqua.yaml" --model "${6:-smollm2}" --resume --out "$out/lot" \
    < "$out/paths.jsonl" > "$out/metrics.jsonl"
echo "figures: $out/lot/" >&2
