#!/usr/bin/env bash
# Round robin and GIT on Asia: five seeds, 33 rounds of 32 rows; a table, events, a picture. About ten minutes of CPU.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p demo
legit-loop --recipe "$here/asia.yaml" --plot demo/legit-asia.svg > demo/legit-asia.jsonl
echo "events in demo/legit-asia.jsonl, picture in demo/legit-asia.svg"
