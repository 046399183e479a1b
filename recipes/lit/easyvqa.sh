#!/usr/bin/env bash
# VIT against LIT on easy-VQA: accuracy, what the image contributes, and the gap between training and held-out loss.
# FULL=1 adds more arms: a short budget, --mode im, and a quarter of the instruction's weight by segment.
# JOBS arms run side by side; what is finished already is not run again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-build/lit}
jobs=${JOBS:-2}
threads=$(($(getconf _NPROCESSORS_ONLN) / jobs))
export TOOLBOX_THREADS=${TOOLBOX_THREADS:-$((threads > 0 ? threads : 1))}
mkdir -p "$out"
[ -d "$out/base" ] || lit-build --lm scratch --vocab-from easy-vqa:train --image-size 96 --calibrate easy-vqa:train \
  --out "$out/base" > "$out/base.json"

arm() { # name seed options...
  local name=$1 seed=$2 run=$out/$1-$2
  shift 2
  [ -f "$run/run.json" ] || lit-tune easy-vqa:train:3000 --model "$out/base" --recipe "$here/easyvqa.yaml" --resume \
    --seed "$seed" --out "$run" --cache-vision "$out/features.safetensors" "$@" > "$run.events"
  [ -f "$run.said" ] || lit-generate easy-vqa:test:1500 --model "$run" --max-new-tokens 4 --batch-size 64 > "$run.part"
  [ -f "$run.said" ] || mv "$run.part" "$run.said"
}

judge() { # name seed: against the answers-only model of the same seed, in pairs
  local run=$out/$1-$2 vit=$out/vit-$2 said=() rows=()
  [ ! -f "$run.figures" ] || return 0
  [ "$1" = vit ] || { said=(--compare "$vit.said") rows=(--compare "$vit.rows"); }
  {
    lit-eval "$run.said" --metric vqa --refs easy-vqa:test:1500 "${said[@]}"
    lit-eval easy-vqa:test:1500 --model "$run" --metric vc,gap --train-rows easy-vqa:train:3000 --batch-size 64 \
      --rows-out "$run.rows" "${rows[@]}"
  } > "$run.part"
  mv "$run.part" "$run.figures"
}

beside() { # starts a job as soon as fewer than JOBS are running
  [ "$(jobs -rp | wc -l)" -lt "$jobs" ] || wait -n
  "$@" &
}

finish() { # waits for all of them; one that failed ends this
  local process
  for process in $(jobs -p); do wait "$process"; done
}

seeds=${SEEDS:-0 1}
others="lit"
for seed in $seeds; do
  beside arm vit "$seed" --mode vit
  beside arm lit "$seed" --mode lit
  if [ "${FULL:-0}" = 1 ]; then
    beside arm quarter "$seed" --mode lit --normalize segment --instruct-weight .25
    for mode in vit lit im; do beside arm "short-$mode" "$seed" --mode $mode --epochs 8; done
    others="lit quarter short-vit short-lit short-im"
  fi
done
finish
for seed in $seeds; do beside judge vit "$seed"; done
finish
for seed in $seeds; do for name in $others; do beside judge "$name" "$seed"; done; done
finish
python3 "$here/easyvqa.py" "$out" vit $others
