#!/usr/bin/env bash
# TOFU in small: tune SmolLM2 on 8 + 8 rows, then forget the first 8 by five methods.
#   recipes/unlearning/tofu-small.sh FOLDER-WITH-TOFU [OUT] [SEED]        or: make unlearn-tofu-small DATA=FOLDER
# TOFU's files: https://huggingface.co/datasets/locuslab/TOFU (forget01.json, retain90.json.gz or retain90.json).
set -euo pipefail
data=${1:?the folder with forget01.json and retain90.json[.gz]}
out=${2:-demo/tofu}
seed=${3:-0}
mkdir -p "$out"
head -n 8 "$data/forget01.json" > "$out/forget.jsonl"
if [ -e "$data/retain90.json.gz" ]; then
    { zcat "$data/retain90.json.gz" || true; } 2> /dev/null | head -n 8 > "$out/retain.jsonl"
else
    head -n 8 "$data/retain90.json" > "$out/retain.jsonl"
fi

cat "$out/forget.jsonl" "$out/retain.jsonl" |
    lm-tune --template qa --out "$out/target" --overwrite --epochs 6 --batch-size 4 --lr 1e-4 --weight-decay .01 \
        --seed "$seed" > "$out/tune.jsonl"

unlearn() { # NAME COMMAND OPTIONS...
    local name=$1 command=$2
    shift 2
    "$command" --model "$out/target" --forget "$out/forget.jsonl" --retain "$out/retain.jsonl" --epochs 3 \
        --batch-size 4 --lr 5e-5 --weight-decay 0 --seed "$seed" --out "$out/$name" --overwrite --quiet \
        --plot "$out/$name.svg" "$@" > "$out/$name.jsonl"
}
unlearn unlearned satimp-unlearn
unlearn ga gru-unlearn --objective ga --no-rectify
unlearn gru-ga gru-unlearn --objective ga --log-geffect "$out/gru-ga.geffect.jsonl"
unlearn graddiff gru-unlearn --objective graddiff --no-rectify

unlearn-eval --forget "$out/forget.jsonl" --retain "$out/retain.jsonl" --metrics es,prob --uwc "$out/target" \
    --model "$out/target" --model "$out/unlearned" --model "$out/ga" --model "$out/gru-ga" --model "$out/graddiff" \
    --plot "$out/tradeoff.svg" > "$out/scores.jsonl"
