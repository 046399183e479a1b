#!/usr/bin/env bash
# The WinoControl grid on the first LIMIT sentences, three wordings: accuracy by cell, gains over step-by-step reasoning.
#   recipes/lot/winocontrol.sh WINOBIAS-FOLDER [OUT] [LIMIT] [MODEL]        or: make lot-winocontrol DATA=WINOBIAS-FOLDER
# The whole grid (396 sentences, 10,692 prompts) is for a GPU or an endpoint.
set -euo pipefail
data=${1:?the folder of WinoBias}
out=${2:-demo/winocontrol}
limit=${3:-2}
model=${4:-smollm2}
mkdir -p "$out"
lot-data winocontrol "$data" --limit "$limit" |
    lot-prompt --recipe "$(dirname "$0")/winocontrol.yaml" |
    lm-generate --model "$model" --max-new-tokens 32 --log "$out/responses.jsonl" --resume |
    lot-eval --baseline cot --report "$out/report.md" --figure "$out/grid.svg" > "$out/scores.jsonl"
echo "report: $out/report.md, figure: $out/grid.svg" >&2
