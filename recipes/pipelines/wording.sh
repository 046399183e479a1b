#!/usr/bin/env bash
# Does the wording of a prompt move the landscape of the answers' thoughts? Questions under two wordings, several paths
# each, judged against each other and drawn on one map.
#   recipes/pipelines/wording.sh [OUT]        or: make pipe-wording
# DATA (a file of multiple-choice questions), MODEL, VARIANTS (the first is the baseline), N paths, TOKENS, and LAUNCH
# (-j 2, or --accelerate FILE) may be set. A killed run goes on; what is finished is not made again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-demo/wording}
data=${DATA:-$here/questions.jsonl} model=${MODEL:-smollm2} variants=${VARIANTS:-cot,lot2}
read -ra launch <<< "${LAUNCH:-}"
mkdir -p "$out"

lot-data mcq "$data" |
    lot-prompt --variant "$variants" --shuffle-choices |
    lm-generate --model "$model" --n "${N:-3}" --temperature 1 --max-new-tokens "${TOKENS:-64}" \
        --log "$out/responses.jsonl" --resume "${launch[@]}" |
    tee "$out/paths.jsonl" |
    lot-eval --baseline "${variants%%,*}" --report "$out/accuracy.md" --figure "$out/accuracy.svg" > "$out/scores.jsonl"
landscape-plot --model "$model" --by variant --split sentence --resume --out "$out/landscape" "${launch[@]}" \
    < "$out/paths.jsonl" > "$out/metrics.jsonl"
echo "accuracy: $out/accuracy.md, maps: $out/landscape/" >&2
