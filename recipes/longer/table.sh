#!/usr/bin/env bash
# The same-budget table: every architecture on the same labels, the same features, several budgets and seeds.
#   recipes/longer/table.sh LOG [OUT] [SEEDS] [BUDGETS]        or: make longer-table DATA=assist2017.jsonl.gz
# LOG is ASSISTments 2017 as JSON lines (user, item, cat, ts, label, fold). Hours on one core with the defaults.
set -euo pipefail
log=${1:?the log: user, item, cat, ts, label, fold}
out=${2:-build/table}
seeds=${3:-"0 1 2"}
budgets=${4:-"85000 170000 340000 700000"}
here=$(dirname "$0")
mkdir -p "$out"
[ -d "$out/data" ] ||
    longer-prep "$log" --side cat --split column:fold=5 --request-window 32 --out "$out/data" > "$out/prep.json"
run() {  # NAME OPTION...: one run of each seed and budget; what is there already stays
    name=$1
    shift
    for seed in $seeds; do
        for labels in $budgets; do
            longer-train "$out/data" --recipe "$here/assist2017.yaml" --seed "$seed" --max-labels "$labels" "$@" \
                --out "$out/$name.$labels.$seed" --resume --quiet > /dev/null
        done
    done
}
run base --arch base
run sumpool --arch sumpool
run din50 --arch din --max-len 50
run din --arch din
run transformer --arch transformer --max-len 128
run hstu --arch hstu --max-len 128
run longer64 --max-len 64
run longer512
python -m toolbox.longer.table "$out" --figure "$out/table.svg" > "$out/table.md"
echo "table: $out/table.md, figure: $out/table.svg" >&2
