#!/usr/bin/env bash
# The real small model (EfficientNet-Lite0 + SmolLM2, 139 M parameters) on three Flickr8k rows, five steps: both losses
# must fall. DATA is the folder with flickr8k_vqa_train.jsonl.gz and flickr8k_224.tar.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:?usage: smol.sh FOLDER}
out=${OUT:-build/lit}
mkdir -p "$out"
lit-templates "$data/flickr8k_vqa_train.jsonl.gz" > "$out/templates.jsonl"
gzip -dc "$data/flickr8k_vqa_train.jsonl.gz" | sed -n 1,3p > "$out/three.jsonl"
lit-tune "$out/three.jsonl" --image-root "$data/flickr8k_224.tar" --recipe "$here/smol-cpu.yaml" \
  --task-templates "$out/templates.jsonl" --out "$out/smol" --overwrite > "$out/smol.events"
python3 - "$out/smol.events" <<'PY'
import json, sys
steps = [row for row in map(json.loads, open(sys.argv[1])) if row["event"] == "step"]
for row in steps:
    print(f"step {row['step']}: response {row['loss_response']:.2f}, instruction {row['loss_instruction']:.2f}, "
          f"{row['tokens']} tokens in {row['seconds']:.1f} s")
for name in ("loss_response", "loss_instruction"):
    assert steps[-1][name] < steps[0][name], name
PY
