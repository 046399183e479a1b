#!/usr/bin/env bash
# MovieLens-100K, temporal split, liked is four stars or more: train, score the test requests, judge with intervals.
#   recipes/longer/ml-100k.sh [OUT]        or: make longer-ml100k
# Needs the data inside recbole: pip install --no-deps recbole==1.2.1 (GroupLens's terms: no redistribution).
set -euo pipefail
out=${1:-build/ml}
mkdir -p "$(dirname "$out")"
longer-prep recbole:ml-100k --map 'label=rating>=4' --split temporal:.8,.1,.1 --out "$out" --overwrite
longer-train "$out" --recipe "$(dirname "$0")/ml-100k.yaml" --out "$out.longer" --overwrite > "$out.events.jsonl"
longer-score --model "$out.longer" --data "$out" --split test | longer-eval - --bootstrap 1000
