#!/usr/bin/env bash
# Tasks of a folder of images learned one after another in five ways, judged side by side at the same k: fine-tuning,
# LwF (distillation, no fusing), and fusing with distillation by plain average, by similar matching, and as LwI.
#   recipes/lwi/tin20-cpu.sh DATA [OUT]        or: make lwi-tin20 DATA=build/tin20
# DATA has train/ and val/ with one sub-folder a class. TASKS (5), LAST (the last task, 2), K (.5), and for tin20-gpu.sh
# RECIPE and MODEL may be set. One core needs about a minute a task and way.
set -euo pipefail
here=$(dirname "$0")
data=$1 out=${2:-demo/lwi-tin20}
recipe=${RECIPE:-$here/tin20-cpu.yaml} model=${MODEL:-cifar-resnet8}
tasks=${TASKS:-5} last=${LAST:-2} k=${K:-.5}
mkdir -p "$out"
learn() { lwi-train "$data/train" --recipe "$recipe" --tasks "$tasks" --overwrite --quiet "$@" | tail -n 1 >&2; }

learn --task 0 --model "$model" -o "$out/m0"
for way in tune lwf mean similar lwi; do
    states=$out/m0
    for task in $(seq 1 "$last"); do
        old=${states##*,} new=$out/$way.n$task fused=$out/$way.m$task
        case $way.$task in
            tune.*) learn --task "$task" --init "$old" --kd 0 -o "$new" ;;
            mean.1 | similar.1 | lwi.1) new=$out/lwf.n1 ;; # the same start, teacher and seed: the same model
            *) learn --task "$task" --init "$old" -o "$new" ;;
        esac
        case $way in
            tune | lwf) fused=$new ;;
            mean) lwi-fuse "$old" "$new" --k "$k" --matching identity --no-diversion --overwrite --quiet -o "$fused" ;;
            similar) lwi-fuse "$old" "$new" --k "$k" --no-diversion --overwrite --quiet -o "$fused" ;;
            lwi) lwi-fuse "$old" "$new" --k "$k" --deep 1 --overwrite --quiet -o "$fused" ;;
        esac > "$out/$way.$task.jsonl"
        states=$states,$fused
    done
    declare "$way=$states"
done
lwi-eval "$data/val" ${lwi//,/ } --name LwI --baseline "fine-tuning=$tune" --baseline "LwF=$lwf" \
    --baseline "average=$mean" --baseline "similar=$similar" --plot "$out/tasks.svg" > "$out/eval.jsonl"
jq -c 'select(.event != "cell") | {name, avg_taw: .avg_taw[-1], avg_tag: .avg_tag[-1], forgetting: .forgetting[-1]}' \
    "$out/eval.jsonl"
