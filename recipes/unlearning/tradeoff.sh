#!/usr/bin/env bash
# The trade-off: ES forget against ES retain, over alpha and beta2 of SatImp and over the learning rate of gradient ascent
# with and without rectification, on eight of the embedded people.
#   recipes/unlearning/tradeoff.sh [OUT]        or: make unlearn-tradeoff
set -euo pipefail
out=${1:-demo/tradeoff}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
python3 - "$here" "$out" <<'PYTHON'
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parents[1])]
import demo

demo.take_people(Path(sys.argv[2]))
PYTHON

lm-tune --model smollm2 --out "$out/target" --resume --epochs 6 --batch-size 8 --lr 2e-4 --weight-decay 0 \
    --eval-every 0 --quiet "$out/people.jsonl" > /dev/null

models=()
unlearn() { # NAME COMMAND OPTIONS...
    local name=$1 command=$2
    shift 2
    "$command" --model "$out/target" --forget "$out/forget.jsonl" --retain "$out/retain.jsonl" --epochs 3 \
        --batch-size 4 --weight-decay 0 --eval-every 0 --quiet --out "$out/$name" --resume "$@" > /dev/null
    models+=(--model "$out/$name")
}
for beta2 in 0 .1 1; do unlearn "satimp-beta2-$beta2" satimp-unlearn --beta2 "$beta2"; done
for alpha in .01 1; do unlearn "satimp-alpha-$alpha" satimp-unlearn --alpha "$alpha"; done
for lr in 2e-5 5e-5 1e-4; do
    unlearn "ga-$lr" gru-unlearn --objective ga --no-rectify --lr "$lr"
    unlearn "gru-$lr" gru-unlearn --objective ga --lr "$lr" --log-geffect "$out/gru-$lr.geffect.jsonl"
done
unlearn-eval "${models[@]}" --forget "$out/forget.jsonl" --retain "$out/retain.jsonl" --authors "$out/neighbours.jsonl" \
    --metrics es,prob --uwc "$out/target" --plot "$out/tradeoff.svg" > "$out/scores.jsonl"
echo "figure: $out/tradeoff.svg; scores: $out/scores.jsonl" >&2
