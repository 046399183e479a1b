#!/usr/bin/env bash
# Safety pairs that reason: the demo pairs (or DATA=a file of your own) through the embedded model, checked and counted.
# A 135M teacher shows that the pipe works; for data worth training on name an endpoint: see docs/coca-refactor.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-coca}
mkdir -p "$out"
head -n "${ROWS:-8}" "${1:-$here/demo.jsonl}" |
    coca-refactor -o "$out/enhanced.jsonl" --overwrite --rejects "$out/rejects.jsonl" --summary "$out/summary.json"
coca-refactor --verify-only --quiet "$out/enhanced.jsonl" | jq -r '[.id, .coca.decision, (.coca.concept | join(", "))] | @tsv'
