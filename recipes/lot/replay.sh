#!/usr/bin/env bash
# Stored responses judged: 1,320 completions of six base models on the Alice questions, read as their source read them.
#   recipes/lot/replay.sh RESPONSES.jsonl.gz [OUT]        or: make lot-replay DATA=RESPONSES.jsonl.gz
set -euo pipefail
data=${1:?a file of completions with id, answer and model}
out=${2:-demo/replay}
mkdir -p "$out"
zcat -f "$data" | lot-eval --by model --format number --pick first --report "$out/report.md" > "$out/scores.jsonl"
echo "report: $out/report.md" >&2
