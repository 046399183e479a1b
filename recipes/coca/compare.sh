#!/usr/bin/env bash
# Does the reasoning change what a model does? Safety pairs are annotated, the same pairs train two adapters, once as they
# were and once with their five tags, and both answer prompts that neither has seen.
#   compare.sh [PAIRS [PROMPTS]]        ENHANCED=FILE takes pairs that are annotated already; OUT is the folder
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
pairs=${1:-$here/demo.jsonl}
prompts=${2:-$here/demo-eval.jsonl}
out=${OUT:-coca/compare}
mkdir -p "$out"
enhanced=${ENHANCED:-$out/enhanced.jsonl}
[ -s "$enhanced" ] || coca-refactor -o "$enhanced" --rejects "$out/rejects.jsonl" "$pairs"
# The control has the rows that were accepted, with the answers they came with.
jq -c --slurpfile kept "$enhanced" 'select(.id as $id | any($kept[]; .id == $id))' "$pairs" > "$out/vanilla.jsonl"
for run in vanilla coca; do
    rows=$out/vanilla.jsonl
    [ $run = coca ] && rows=$enhanced
    [ -d "$out/$run" ] ||
        coca-train --recipe "$here/smollm2-lora.yaml" --epochs "${EPOCHS:-5}" --schedule linear --out "$out/$run" "$rows" \
            > /dev/null
done
coca-eval --intervention vanilla="$out/vanilla" --intervention coca="$out/coca" "$prompts" > "$out/verdicts.jsonl"
coca-eval --baseline vanilla --report "$out/table.md" --plot "$out/rates.svg" "$out/verdicts.jsonl" > /dev/null
cat "$out/table.md"
