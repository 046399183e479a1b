#!/usr/bin/env bash
# CIFAR-10 with a long tail and tail-to-head noise: make it, train, list the doubts, judge. Five minutes on one core.
#   recipes/dull/cifar10-cpu.sh IMAGES [OUT]        or: make dull-cifar DATA=IMAGES
# IMAGES holds cifar10_jpeg.tar.xz, cifar10n_train.jsonl.gz and cifar10_test.jsonl.gz (CIFAR-10: research use).
set -euo pipefail
images=${1:?the folder with cifar10_jpeg.tar.xz and its manifests}
out=${2:-build}
mkdir -p "$out"
[ -d "$out/cifar10" ] || tar xJf "$images/cifar10_jpeg.tar.xz" -C "$out"
dull-noise "$images/cifar10n_train.jsonl.gz" --max-per-class 1500 --imbalance .1 --mode t2h --profile flat --rate .3 \
    --seed 1 --report "$out/noise.json" > "$out/noisy.jsonl"
dull-train "$out/noisy.jsonl" --root "$out" --eval "$images/cifar10_test.jsonl.gz" --eval-every 4 \
    --recipe "$(dirname "$0")/cifar10-cpu.yaml" -o "$out/dull" --resume > "$out/dull.jsonl"
jq -c 'select(.dull.flagged)' "$out/dull/samples.jsonl" > "$out/to_review.jsonl"
dull-eval "$images/cifar10_test.jsonl.gz" --root "$out" --model "$out/dull" --summary-only --plot "$out/confusion.png"
