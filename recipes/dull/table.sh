#!/usr/bin/env bash
# All methods and ablations in one harness, several seeds, as a markdown table with intervals.
#   recipes/dull/table.sh IMAGES [OUT] [SEEDS] [METHODS]        or: make dull-table DATA=IMAGES
# IMAGES as for cifar10-cpu.sh. Two to three minutes a run on one core; what is there already stays.
set -euo pipefail
images=${1:?the folder with cifar10_jpeg.tar.xz and its manifests}
out=${2:-build/dull-table}
seeds=${3:-"1 2 3"}
methods=${4:-"ce la elr dull no-ifd no-ifpu no-aml no-h2t no-logit-adjust open"}
here=$(dirname "$0")
mkdir -p "$out"
[ -d "$out/cifar10" ] || tar xJf "$images/cifar10_jpeg.tar.xz" -C "$out"
for seed in $seeds; do
    dull-noise "$images/cifar10n_train.jsonl.gz" --max-per-class 1500 --imbalance .1 --mode t2h --profile flat \
        --rate .3 --seed "$seed" --quiet > "$out/noisy.$seed.jsonl"
    for method in $methods; do
        case $method in
            no-*) words="--$method" ;;
            open) words="--gate open" ;;
            *) words="--method $method" ;;
        esac
        # shellcheck disable=SC2086  # words are several options
        dull-train "$out/noisy.$seed.jsonl" --root "$out" --eval "$images/cifar10_test.jsonl.gz" --eval-every 0 \
            --recipe "$here/cifar10-cpu.yaml" --seed "$seed" $words -o "$out/$method.$seed" --resume --quiet > /dev/null
    done
done
python -m toolbox.dull.table_of_runs "$out" > "$out/table.md"
echo "table: $out/table.md" >&2
