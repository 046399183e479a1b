#!/usr/bin/env bash
# The untouched model against the same model with the guidelines as its system turn, on the demo's prompts.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-coca}
prompts=${1:-$here/demo-eval.jsonl}
mkdir -p "$out"
head -n "${ROWS:-22}" "$prompts" | coca-eval --quiet > "$out/base.verdicts.jsonl"
head -n "${ROWS:-22}" "$prompts" | coca-eval --quiet --prompt-only > "$out/prompted.verdicts.jsonl"
cat "$out/base.verdicts.jsonl" "$out/prompted.verdicts.jsonl" |
    coca-eval --baseline base --report "$out/table.md" --plot "$out/rates.svg" > /dev/null
