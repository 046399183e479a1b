#!/usr/bin/env bash
# Six Alice questions under two wordings, answered by the embedded model, judged against each other.
# SmolLM2 is far too weak to show what a wording does: this shows the pipe.
#   recipes/lot/demo.sh [OUT]        or: make lot-demo
set -euo pipefail
out=${1:-demo/lot}
mkdir -p "$out"
lot-data alice --limit 6 |
    lot-prompt --variant cot,lot2 |
    lm-generate --max-new-tokens 48 --log "$out/responses.jsonl" --resume |
    lot-eval --baseline cot --report "$out/report.md" --figure "$out/report.svg" > "$out/scores.jsonl"
echo "report: $out/report.md, figure: $out/report.svg" >&2
