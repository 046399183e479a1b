#!/usr/bin/env bash
# Learn from the log of a repository which file somebody touches next, four earlier files drawn for each.
#   recipes/longer/git.sh [REPO] [OUT]        or: make longer-git REPO=some/repository
set -euo pipefail
repo=${1:-.}
out=${2:-build/git}
mkdir -p "$(dirname "$out")"
{
    printf 'user\titem\tts\taction\trequest\n'
    git -C "$repo" log --no-merges --no-renames --name-status --format='@%at%x09%ae%x09%h' |
        awk -F'\t' '/^@/{t=substr($1,2);u=$2;r=$3;next} NF>1{print u"\t"$2"\t"t"\t"$1"\t"r}'
} | longer-prep - --format tsv --event-side action --negatives 4 --split temporal:.8,.1,.1 --out "$out" --overwrite
longer-train "$out" --recipe "$(dirname "$0")/git.yaml" --out "$out.longer" --overwrite | tail -n 1
