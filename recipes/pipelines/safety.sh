#!/usr/bin/env bash
# Does reasoning about concepts change what a model does and what can be read inside it? Safety pairs are annotated, two
# adapters are trained (as they were, with the reasoning), both answer prompts in and out of distribution, and readers look
# for the label in the hidden states before and after training.
#   recipes/pipelines/safety.sh [OUT]        or: make pipe-safety
# DATA (labelled pairs), PROMPTS (to judge by), ROWS of DATA, ENHANCED (pairs that are annotated already), EPOCHS and MODEL
# may be set; as may any option by its name in the environment (TOOLBOX_NUM_PROCESSES=2). What is there is not made again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-demo/safety}
data=${DATA:-$here/../coca/demo.jsonl}
export TOOLBOX_MODEL=${MODEL:-smollm2}
mkdir -p "$out"
head -n "${ROWS:-16}" "$data" > "$out/pairs.jsonl"

OUT=$out EPOCHS=${EPOCHS:-3} bash "$here/../coca/compare.sh" "$out/pairs.jsonl" \
    "${PROMPTS:-$here/../coca/demo-eval.jsonl}"

for state in before vanilla coca; do
    trained=()
    [ $state = before ] || trained=(--intervention "$out/$state")
    [ -s "$out/probe.$state.jsonl" ] ||
        coca-probe --eraser none --eraser leace "${trained[@]}" --plot "$out/probe.$state.svg" "$data" \
            > "$out/probe.part"
    [ ! -e "$out/probe.part" ] || mv "$out/probe.part" "$out/probe.$state.jsonl"
done
for state in before vanilla coca; do
    jq -s -c --arg state $state 'map(select(.layer != null)) | (map(.layer) | max) as $last | map(select(.layer == $last))
        | {state: $state, layer: $last, linear: (map({(.eraser): .linear_acc}) | add),
           rbf: (map({(.eraser): .rbf_acc}) | add)}' "$out/probe.$state.jsonl"
done | tee "$out/probes.jsonl"
echo "attack success and over-refusal: $out/table.md, readers: $out/probes.jsonl" >&2
