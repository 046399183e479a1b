#!/usr/bin/env bash
# Designs over the measured proteins: three seeds, 33 rounds of 32 rows out of the pool. DATA is the folder of its files.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:?DATA=the folder with sachs.discrete.jsonl.gz and sachs.variables.jsonl}
mkdir -p demo
legit-loop --recipe "$here/sachs.yaml" --pool "$data/sachs.discrete.jsonl.gz" \
    --variables "$data/sachs.variables.jsonl" --plot demo/legit-sachs.svg --plot demo/legit-sachs.html \
    > demo/legit-sachs.jsonl
echo "events in demo/legit-sachs.jsonl, pictures in demo/legit-sachs.svg and demo/legit-sachs.html"
