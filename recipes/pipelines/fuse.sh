#!/usr/bin/env bash
# Can two fine-tuned models be made one that knows what both know? One model is taught two sets of people apart from each
# other, the two results are fused, with their channels matched and as they are, and each is asked about both sets.
#   recipes/pipelines/fuse.sh [OUT]        or: make pipe-fuse
# ONE, TWO (files of question and answer), ROWS of each, MODEL, K (the weight of the first), and LAUNCH (-j 2, or
# --accelerate FILE; for training and judging) may be set. A killed run goes on; what is finished is not made again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-demo/fuse}
people=$here/../unlearning/people model=${MODEL:-smollm2} rows=${ROWS:-8}
read -ra launch <<< "${LAUNCH:-}"
mkdir -p "$out"
head -n "$rows" "${ONE:-$people/retain.jsonl}" > "$out/one.jsonl"
head -n "$rows" "${TWO:-$people/neighbours.jsonl}" > "$out/two.jsonl"

for set in one two; do
    lm-tune --model "$model" --out "$out/$set" --resume --epochs 6 --batch-size 8 --lr 2e-4 --weight-decay 0 \
        --eval-every 0 "${launch[@]}" "$out/$set.jsonl" > /dev/null
done
lwi-fuse "$out/one" "$out/two" --k "${K:-.5}" --no-diversion --resume --plot "$out/matched.svg" -o "$out/matched" \
    > "$out/matched.groups.jsonl"
lwi-fuse "$out/one" "$out/two" --k "${K:-.5}" --matching identity --no-diversion --resume -o "$out/average" \
    > "$out/average.groups.jsonl"
unlearn-eval --model "$model" --model "$out/one" --model "$out/two" --model "$out/matched" --model "$out/average" \
    --forget "$out/one.jsonl" --retain "$out/two.jsonl" --metrics es,prob --template chat --plot "$out/scores.svg" \
    "${launch[@]}" > "$out/scores.jsonl"
jq -c '{model: .model | split("/") | last, one: {es: .es.forget, p: .prob.forget}, two: {es: .es.retain, p: .prob.retain}}' \
    "$out/scores.jsonl"
echo "scores: $out/scores.jsonl, what moved: $out/matched.groups.jsonl" >&2
