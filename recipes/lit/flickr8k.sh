#!/usr/bin/env bash
# Flickr8k with EfficientNet-Lite0 + SmolLM2: the connector on captions, then four label modes on the same rows; captions,
# POPE, VQA, what the image contributes and the gap, with paired intervals against VIT. For a GPU.
# DATA is the folder with flickr8k_*.jsonl.gz and flickr8k_224.tar; ROWS cuts it down to try the script.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:?usage: flickr8k.sh FOLDER}
out=${OUT:-build/lit/flickr8k}
rows=${ROWS:-1000000}
more=${MORE:-}
ask='Provide a one-sentence caption for the provided image.'
mkdir -p "$out"
cut() { gzip -dc "$data/flickr8k_$1.jsonl.gz" | sed -n "1,${rows}p" > "$out/$1.jsonl"; }
for name in vqa_train vqa_test captions_train captions_test; do cut "$name"; done
root=(--image-root "$data/flickr8k_224.tar")
lit-templates "$out/vqa_train.jsonl" > "$out/templates.jsonl"
[ -d "$out/base" ] || lit-build ${BASE:-} --out "$out/base" > "$out/base.json"
[ -d "$out/aligned" ] || lit-tune "$out/captions_train.jsonl" "${root[@]}" --stage pretrain --model "$out/base" \
  --recipe "$here/flickr8k.yaml" --epochs 1 --lr 1e-3 --cache-vision "$out/features.safetensors" $more \
  --out "$out/aligned" > "$out/aligned.events"
lit-pope "$out/captions_test.jsonl" --strategy random --strategy popular --strategy adversarial \
  --suffix ' Answer the question using a single word or phrase.' > "$out/pope.jsonl"
for seed in ${SEEDS:-0 1}; do
  for mode in vit im lit-system lit; do
    run="$out/$mode-$seed"
    [ -d "$run" ] || lit-tune "$out/vqa_train.jsonl" "${root[@]}" --model "$out/aligned" --mode "$mode" --seed "$seed" \
      --task-templates "$out/templates.jsonl" --recipe "$here/flickr8k.yaml" \
      --cache-vision "$out/features.safetensors" $more --out "$run" > "$run.events"
    lit-generate "$out/captions_test.jsonl" "${root[@]}" --model "$run" --prompt "$ask" --max-new-tokens 32 \
      --batch-size 32 > "$run.captions"
    lit-generate "$out/pope.jsonl" "${root[@]}" --model "$run" --max-new-tokens 4 --batch-size 32 > "$run.pope"
    lit-generate "$out/vqa_test.jsonl" "${root[@]}" --model "$run" --all-turns --max-new-tokens 8 --batch-size 32 \
      > "$run.answers"
    against() { [ "$mode" = vit ] || echo "--compare $out/vit-$seed.$1"; }
    {
      lit-eval "$run.captions" --metric cider,chair --refs "$out/captions_test.jsonl" $(against captions)
      lit-eval "$run.pope" --metric pope --refs "$out/pope.jsonl" $(against pope)
      lit-eval "$run.answers" --metric vqa --refs "$out/vqa_test.jsonl" $(against answers)
      lit-eval "$out/vqa_test.jsonl" "${root[@]}" --model "$run" --metric vc,gap --train-rows "$out/vqa_train.jsonl" \
        --batch-size 32 --rows-out "$run.rows" $(against rows)
    } > "$run.figures"
  done
done
python3 - "$out" <<'PY'
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.figures")):
    for row in map(json.loads, path.read_text().splitlines()):
        low, high = row["ci"]
        value = "none" if row["value"] is None else f"{row['value']:.4f}"
        there = row.get("compare")
        other = f"   against vit {there['difference']:+.4f} {there['ci']}" if there and there["difference"] is not None else ""
        print(f"{path.stem:<16}{row['metric']:<20}{value:>10}  [{low}, {high}]{other}")
PY
