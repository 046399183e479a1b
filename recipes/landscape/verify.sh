#!/usr/bin/env bash
# A verifier learned from the released paths and judged on held-out questions; votes with and without it.
# Scores the paths first where recipes/landscape/demo.sh has not.
#   recipes/landscape/verify.sh DEMO-PATHS.jsonl.gz [OUT]        or: make landscape-verify DATA=DEMO-PATHS.jsonl.gz
set -euo pipefail
data=${1:?a file of reasoning paths}
out=${2:-demo/landscape}
mkdir -p "$out"
zcat -f "$data" |
    landscape-plot --recipe "$(dirname "$0")/demo.yaml" --resume --out "$out/land" > "$out/metrics.jsonl"
zcat -f "$data" |
    landscape-verify --features "$out/land/features.safetensors" --save "$out/verifier.safetensors" --overwrite \
        --report "$out/verifier.md" |
    lot-eval --vote plurality,weighted --report "$out/votes.md" > "$out/votes.jsonl"
echo "reports: $out/verifier.md, $out/votes.md" >&2
