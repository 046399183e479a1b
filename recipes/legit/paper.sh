#!/usr/bin/env bash
# The paper's grid: four networks, 32 and 16 rows a round, eight strategies, ten seeds. Days of CPU: see --dry-run first.
#   paper.sh PLAN.json [OPTIONS...]    as in: paper.sh plans.json --dry-run --backend replay --replay replies.jsonl
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
plan=${1:?a file with a plan a network: {"networks": {"asia": {"order": [...]}, ...}}}
shift
mkdir -p designs
for network in asia child insurance alarm; do
    for rows in 32 16; do
        legit-loop --recipe "$here/paper.yaml" --network "$network" -n "$rows" --plan "$plan" \
            --state "designs/$network-$rows" --resume --plot "designs/$network-$rows.svg" "$@" \
            > "designs/$network-$rows.jsonl"
        jq -c 'select(.event == "plan") | {n: .settings.n, network: .settings.network, runs, cpu_hours}' \
            "designs/$network-$rows.jsonl"
    done
done
