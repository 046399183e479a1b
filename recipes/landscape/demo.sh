#!/usr/bin/env bash
# The 50 released paths scored by the embedded model and drawn, by t-SNE and by PCA (about five CPU-minutes).
# A second run scores nothing; a killed one goes on.
#   recipes/landscape/demo.sh DEMO-PATHS.jsonl.gz [OUT]        or: make landscape-demo DATA=DEMO-PATHS.jsonl.gz
set -euo pipefail
data=${1:?a file of reasoning paths}
out=${2:-demo/landscape}
mkdir -p "$out"
zcat -f "$data" |
    landscape-plot --recipe "$(dirname "$0")/demo.yaml" --resume --out "$out/land" > "$out/metrics.jsonl"
zcat -f "$data" |
    landscape-plot --features "$out/land/features.safetensors" --project pca --resume --out "$out/pca" > /dev/null
echo "figures: $out/land/landscape_k5.png, $out/land/metrics.png, $out/pca/landscape_k5.png" >&2
