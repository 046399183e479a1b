#!/usr/bin/env bash
# Can a design be repeated to the byte when a language model had a say in it? The questions that LeGIT would put are answered
# by lm-generate, whose log is kept; designs run on these stored answers, once more, and nothing differs.
#   recipes/pipelines/replay.sh [OUT]        or: make pipe-replay
# NETWORK, SEEDS, ROUNDS, MODEL, VOTES (answers a question), TOKENS, LOOP (further options of legit-loop), and LAUNCH (-j 2,
# or --accelerate FILE; for the answers) may be set. What is answered already is not asked again.
set -euo pipefail
out=${1:-demo/replay}
network=${NETWORK:-asia} seeds=${SEEDS:-2} rounds=${ROUNDS:-12} model=${MODEL:-smollm2} votes=${VOTES:-5} warmup=3
read -ra loop <<< "${LOOP:-}"
read -ra launch <<< "${LAUNCH:-}"
mkdir -p "$out"
log=$out/answers.jsonl
touch "$log"
stages=(--n-warmup "$warmup" --self-consistency "$votes" --redraws 0 --backend replay --replay "$log")

for ((seed = 0; seed < seeds; seed++)); do
    # The second question names the targets of the first rounds: these are done by hand, with a learner of no weight.
    rows=$out/rows-$seed.jsonl state=$out/state-$seed
    rm -rf "$state"
    legit-sim --network "$network" -n 60 --seed "$seed" > "$rows"
    target() {
        legit-target --network "$network" --strategy legit+random --state "$state" --seed "$seed" "${stages[@]}" \
            --obs-iters 1 --model-iters 1 --graph-iters 1 "$@" < "$rows"
    }
    ask() {
        target --dry-run | lm-generate --model "$model" --n "$votes" --temperature 1 --max-new-tokens "${TOKENS:-192}" \
            --log "$log" --resume "${launch[@]}" > /dev/null
    }
    ask
    for ((round = 1; round <= warmup; round++)); do
        target | legit-sim --network "$network" --from - --seed "$seed" > "$out/new.jsonl"
        cat "$out/new.jsonl" >> "$rows"
    done
    ask
done

for run in first second; do
    legit-loop --network "$network" --strategies legit+git,git --baseline git --seeds "$seeds" --rounds "$rounds" \
        "${stages[@]}" --plot "$out/$run.svg" "${loop[@]}" > "$out/$run.jsonl"
done
cmp "$out/first.jsonl" "$out/second.jsonl"
jq -c 'select(.event == "run" and .strategy != "git") | {seed, picks, stages, fallbacks, answers, answers_without_names, shd}' \
    "$out/first.jsonl"
echo "the same bytes twice: $out/first.jsonl; answers: $log" >&2
