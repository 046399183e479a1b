#!/usr/bin/env bash
# What does unlearning cost, and where do the answers go? A model learns invented people, forgets some of them at several
# strengths (SatImp's weights, gradients rectified by GRU), is judged on both sides, and answers the same questions before
# and after: one map of where its answers lie between the true fact and three false ones.
#   recipes/pipelines/unlearn.sh [OUT]        or: make pipe-unlearn
# DATA (a folder with forget, retain and neighbours.jsonl, TOFU-shaped), ROWS of each, MODEL, LRS (the sweep), N answers a
# question, and LAUNCH (-j 2, or --accelerate FILE) may be set. A killed run goes on; what is finished is not made again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-demo/unlearn}
data=${DATA:-$here/../unlearning/people} model=${MODEL:-smollm2} rows=${ROWS:-8}
read -ra lrs <<< "${LRS:-2e-5 5e-5 1e-4}"
read -ra launch <<< "${LAUNCH:-}"
mkdir -p "$out"
for set in forget retain neighbours; do head -n "$rows" "$data/$set.jsonl" > "$out/$set.jsonl"; done

cat "$out"/{forget,retain,neighbours}.jsonl |
    lm-tune --model "$model" --out "$out/before" --resume --epochs 6 --batch-size 8 --lr 2e-4 --weight-decay 0 \
        --eval-every 0 "${launch[@]}" > "$out/before.events.jsonl"

models=(--model "$out/before")
for lr in "${lrs[@]}"; do
    gru-unlearn --objective satimp --model "$out/before" --forget "$out/forget.jsonl" --retain "$out/retain.jsonl" \
        --epochs 3 --batch-size 4 --lr "$lr" --weight-decay 0 --eval-every 0 --out "$out/lr-$lr" --resume \
        "${launch[@]}" > "$out/lr-$lr.events.jsonl"
    models+=(--model "$out/lr-$lr")
done
unlearn-eval "${models[@]}" --forget "$out/forget.jsonl" --retain "$out/retain.jsonl" \
    --authors "$out/neighbours.jsonl" --metrics es,prob,truth_ratio --plot "$out/tradeoff.svg" "${launch[@]}" \
    > "$out/scores.jsonl"

# The last strength against none. A path's answer is the one fact that it names; more than one, or none: no answer.
for state in before "lr-${lrs[-1]}"; do
    for set in forget retain; do
        lot-data mcq "$out/$set.jsonl" --shape tofu |
            lm-generate --model "$out/$state" --map prompt=question --n "${N:-3}" --temperature 1 --max-new-tokens 32 \
                --log "$out/answers.jsonl" --resume "${launch[@]}" |
            jq -c --arg state "$state" '. as $row | .meta = {state: $state, set: .dataset}
                | .path_id = $state + "/" + .path_id
                | .pred = ([.choices[] | select(. as $fact | $row.completion | contains($fact))]
                    | if length == 1 then .[0] else null end)'
    done
done > "$out/paths.jsonl"
landscape-plot --model "$model" --by state,set --answer-template '{text}' --resume \
    --out "$out/landscape" "${launch[@]}" < "$out/paths.jsonl" > "$out/metrics.jsonl"
jq -c 'select(.event == "bin" and .bin == null and .outcome == "all") | {facet, paths, correct: .metrics.correct}' \
    "$out/metrics.jsonl"
echo "trade-off: $out/tradeoff.svg, scores: $out/scores.jsonl, maps: $out/landscape/" >&2
