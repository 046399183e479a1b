#!/usr/bin/env bash
# Learning one task after another from noisy labels: each task is long-tailed with tail-to-head noise, is learned by DULL from
# the model of the task before, with a few old images that DULL did not doubt as its memory, and is fused with that model.
# Judged beside the same without fusing.
#   recipes/pipelines/tasks.sh [OUT]        or: make pipe-tasks
# DATA, TEST (manifests or folders; default: scikit-learn's digits), TASKS (classes of each task), MODEL (a backbone), SIZE
# (of images), RATE (of noise), MEMORY (images a class), EPOCHS, K (the old model's weight), DEEP (groups in which
# the least similar channels meet, as LwI has it: 1), and LAUNCH (-j 2, or --accelerate FILE; for training) may be set.
# What is there already is not made again.
set -euo pipefail
out=${1:-demo/tasks}
data=${DATA:-digits#train} test=${TEST:-digits#test}
read -ra tasks <<< "${TASKS:-0,1,2,3 4,5,6 7,8,9}"
read -ra launch <<< "${LAUNCH:-}"
mkdir -p "$out"
memory=$out/memory.jsonl
: > "$memory"

train() { # NAME OPTIONS...: memory and the noisy rows of this task, learned
    local name=$1
    shift
    cat "$memory" "$out/noisy.$task.jsonl" |
        dull-train - --aug crop --epochs "${EPOCHS:-12}" --eval-every 0 --resume --quiet -o "$out/$name" "$@" \
            "${launch[@]}" > "$out/$name.events.jsonl"
}

fused=$out/fused.0 plain=$out/fused.0
for task in "${!tasks[@]}"; do
    dull-noise "$data" --mode none --quiet |
        jq -c --arg labels "${tasks[task]}" 'select(.label | IN($labels | split(",")[]))' |
        dull-noise - --imbalance .5 --rate "${RATE:-.2}" --seed "$task" --report "$out/noise.$task.json" \
            > "$out/noisy.$task.jsonl"
    if [ "$task" = 0 ]; then
        train fused.0 --model "${MODEL:-cifar-resnet8}" --image-size "${SIZE:-16}"
    else
        old=$out/fused.$((task - 1))
        train "new.$task" --model "$old"
        train "plain.$task" --model "${plain##*,}"
        lwi-fuse "$old" "$out/new.$task" --k "${K:-auto}" --deep "${DEEP:-0}" --resume --quiet -o "$out/fused.$task" \
            > "$out/fused.$task.jsonl"
        fused+=,$out/fused.$task plain+=,$out/plain.$task
    fi
    learned=$out/new.$task
    [ "$task" != 0 ] || learned=$out/fused.0
    jq -c -n --slurpfile listed "$learned/samples.jsonl" --argjson most "${MEMORY:-12}" '
        INDEX($listed[]; .id) as $doubts
        | [inputs | select($doubts[.id].dull.flagged | not)] | group_by(.label)[] | .[:$most][]' \
        "$out/noisy.$task.jsonl" >> "$memory"
done
lwi-eval "$test" ${fused//,/ } --name fused --baseline "not fused=$plain" --plot "$out/tasks.svg" > "$out/eval.jsonl"
jq -c 'select(.event != "cell") | {name, avg_taw, avg_tag, forgetting, difference}' "$out/eval.jsonl"
echo "accuracies: $out/eval.jsonl, figure: $out/tasks.svg" >&2
