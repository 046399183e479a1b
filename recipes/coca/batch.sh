#!/usr/bin/env bash
# A batch file instead of an endpoint: write the questions, have them answered, read the answers back.
#   batch.sh safety.jsonl MODEL        (vllm run-batch has to be installed)
set -euo pipefail
pairs=$1 model=$2
coca-refactor --backend openai --model "$model" --emit-requests < "$pairs" > requests.jsonl
vllm run-batch -i requests.jsonl -o answers.jsonl --model "$model"
coca-refactor --backend replay --responses answers.jsonl --on-bad skip < "$pairs" > enhanced.jsonl
