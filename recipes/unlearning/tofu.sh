#!/usr/bin/env bash
# The full TOFU benchmark, forget10, for a GPU (an epoch of TOFU on a CPU is most of an hour even for SmolLM2).
#   recipes/unlearning/tofu.sh FOLDER-WITH-TOFU [MODEL] [OUT] [LAUNCH OPTIONS...]        or: make unlearn-tofu DATA=FOLDER
# e.g. recipes/unlearning/tofu.sh tofu smollm2 demo/tofu10 -j 2
set -euo pipefail
data=${1:?the folder with the files of TOFU}
model=${2:-smollm2}
out=${3:-demo/tofu10}
launch=("${@:4}")
mkdir -p "$out"
found() { for file in "$data/$1.json" "$data/$1.json.gz"; do [ -e "$file" ] && echo "$file" && return; done; }

for name in full retain90; do
    lm-tune --model "$model" --out "$out/$name" --resume --epochs 5 --batch-size 32 --weight-decay .01 --warmup .2 \
        "${launch[@]}" "$(found $name)" > /dev/null
done
unlearn() { # NAME COMMAND OPTIONS...
    local name=$1 command=$2
    shift 2
    "$command" --model "$out/full" --forget "$(found forget10)" --retain "$(found retain90)" --holdout 400 \
        --out "$out/$name" --resume "${launch[@]}" "$@" > /dev/null
}
unlearn satimp satimp-unlearn
for objective in ga npo simnpo wga graddiff; do
    unlearn "$objective" gru-unlearn --objective "$objective" --no-rectify
done
for objective in ga npo simnpo wga satimp; do unlearn "gru-$objective" gru-unlearn --objective "$objective"; done

models=()
for name in full satimp ga npo simnpo wga graddiff gru-ga gru-npo gru-simnpo gru-wga gru-satimp; do
    models+=(--model "$out/$name")
done
unlearn-eval --model "$out/retain90" --suite "tofu:$data" --split forget10 --limit 300 --log "$out/retain90.log.json" \
    "${launch[@]}" > "$out/retain90.score.jsonl"
unlearn-eval "${models[@]}" --suite "tofu:$data" --split forget10 --limit 300 --reference "$out/retain90.log.json" \
    --uwc "$out/full" --plot "$out/tradeoff.svg" "${launch[@]}" > "$out/scores.jsonl"
