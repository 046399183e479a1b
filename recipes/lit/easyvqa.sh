#!/usr/bin/env bash
# VIT against LIT on easy-VQA: accuracy, what the image contributes, and the gap between training and held-out loss.
# FULL=1 adds more arms: a short budget, --mode im, and a quarter of the instruction's weight by segment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-build/lit}
mkdir -p "$out"
[ -d "$out/base" ] || lit-build --lm scratch --vocab-from easy-vqa:train --image-size 96 --calibrate easy-vqa:train \
  --out "$out/base" > "$out/base.json"

arm() { # name seed options...
  local name=$1 seed=$2
  shift 2
  [ -f "$out/$name-$seed/run.json" ] || lit-tune easy-vqa:train:3000 --model "$out/base" --recipe "$here/easyvqa.yaml" \
    --seed "$seed" --out "$out/$name-$seed" --cache-vision "$out/features.safetensors" "$@" > "$out/$name-$seed.events"
  lit-generate easy-vqa:test:1500 --model "$out/$name-$seed" --max-new-tokens 4 --batch-size 64 > "$out/$name-$seed.said"
  lit-eval "$out/$name-$seed.said" --metric vqa --refs easy-vqa:test:1500 > "$out/$name-$seed.figures"
  lit-eval easy-vqa:test:1500 --model "$out/$name-$seed" --metric vc,gap --train-rows easy-vqa:train:3000 \
    --batch-size 64 >> "$out/$name-$seed.figures"
}

seeds=${SEEDS:-0 1}
arms="vit lit"
for seed in $seeds; do
  arm vit "$seed" --mode vit
  arm lit "$seed" --mode lit
  if [ "${FULL:-0}" = 1 ]; then
    arm quarter "$seed" --mode lit --normalize segment --instruct-weight .25
    for mode in vit lit im; do arm "short-$mode" "$seed" --mode $mode --epochs 8; done
    arms="vit lit quarter short-vit short-lit short-im"
  fi
done
python3 "$here/easyvqa.py" "$out" $arms
