#!/usr/bin/env bash
# TOFU in small: tune SmolLM2 on 8 + 8 rows, then forget the first 8 (about four minutes on two cores).
#   recipes/unlearning/tofu-small.sh FOLDER-WITH-TOFU [OUT]        or: make tofu-small DATA=FOLDER
# TOFU's files: https://huggingface.co/datasets/locuslab/TOFU (forget01.json, retain90.json.gz or retain90.json).
set -euo pipefail
data=${1:?the folder with forget01.json and retain90.json[.gz]}
out=${2:-demo/tofu}
mkdir -p "$out"
head -n 8 "$data/forget01.json" > "$out/forget.jsonl"
if [ -e "$data/retain90.json.gz" ]; then
    { zcat "$data/retain90.json.gz" || true; } 2> /dev/null | head -n 8 > "$out/retain.jsonl"
else
    head -n 8 "$data/retain90.json" > "$out/retain.jsonl"
fi

cat "$out/forget.jsonl" "$out/retain.jsonl" |
    lm-tune --template qa --out "$out/target" --overwrite --epochs 6 --batch-size 4 --lr 1e-4 --weight-decay .01 \
        > "$out/tune.jsonl"

satimp-unlearn --model "$out/target" --forget "$out/forget.jsonl" --retain "$out/retain.jsonl" \
    --out "$out/unlearned" --overwrite --epochs 3 --batch-size 4 --plot "$out/unlearn.svg" |
    tee "$out/unlearn.jsonl" | tail -n 1
