#!/usr/bin/env bash
# Methods on the embedded people (24 invented people, 16 rows to forget), judged with everything unlearn-eval has
# (what is there already is not made again; events are in each model's events.jsonl).
#   recipes/unlearning/people-table.sh [OUT]        or: make unlearn-people
set -euo pipefail
out=${1:-demo/people}
people=$(cd "$(dirname "$0")" && pwd)/people
mkdir -p "$out"
cat "$people"/{forget,retain,neighbours}.jsonl > "$out/all.jsonl"
cat "$people"/{retain,neighbours}.jsonl > "$out/rest.jsonl"

tune() { # NAME ROWS
    lm-tune --model smollm2 --out "$out/$1" --resume --epochs 6 --batch-size 8 --lr 2e-4 --weight-decay 0 \
        --eval-every 0 --quiet "$2" > /dev/null
    cp "$out/$1/events.jsonl" "$out/$1.jsonl"
}
unlearn() { # NAME COMMAND OPTIONS...
    local name=$1 command=$2
    shift 2
    "$command" --model "$out/target" --forget "$people/forget.jsonl" --retain "$people/retain.jsonl" \
        --epochs 3 --batch-size 8 --lr 5e-5 --weight-decay 0 --eval-every 0 --quiet --out "$out/$name" --resume "$@" \
        > /dev/null
    cp "$out/$name/events.jsonl" "$out/$name.jsonl"
}
judge() { # NAME OPTIONS...
    local name=$1
    shift
    if [ ! -s "$out/$name.score.json" ]; then
        local model=$out/$name
        [ "$name" = base ] && model=smollm2
        unlearn-eval --model "$model" --suite people --limit 24 --max-new-tokens 40 --quiet "$@" \
            --log "$out/$name.log.json" > "$out/$name.part.json"
        mv "$out/$name.part.json" "$out/$name.score.json"
    fi
}

tune target "$out/all.jsonl"
tune retain-only "$out/rest.jsonl"
judge retain-only --quantize rtn4 --relearn 4 --relearn-steps 10
survival=(--reference "$out/retain-only.log.json" --uwc "$out/target" --quantize rtn4 --relearn 4 --relearn-steps 10)

unlearn satimp satimp-unlearn
judge satimp "${survival[@]}"
unlearn gru-satimp gru-unlearn --objective satimp
judge gru-satimp "${survival[@]}"
for objective in ga npo graddiff simnpo wga; do
    unlearn "$objective" gru-unlearn --objective "$objective" --no-rectify
    judge "$objective" "${survival[@]}"
done
for objective in ga npo; do
    unlearn "gru-$objective" gru-unlearn --objective "$objective"
    judge "gru-$objective" "${survival[@]}"
done
judge target --reference "$out/retain-only.log.json" --quantize rtn4
judge base --reference "$out/retain-only.log.json"
cat "$out"/*.score.json > "$out/scores.jsonl"
echo "scores: $out/scores.jsonl" >&2
