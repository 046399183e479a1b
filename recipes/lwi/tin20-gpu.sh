#!/usr/bin/env bash
# tin20-cpu.sh at the size at which accuracies mean something: ResNet-18, 64 x 64, 100 epochs, all five tasks; for a GPU.
#   recipes/lwi/tin20-gpu.sh DATA [OUT]
set -euo pipefail
here=$(dirname "$0")
RECIPE=$here/tin20-gpu.yaml MODEL=preact-resnet18 LAST=${LAST:-4} exec bash "$here/tin20-cpu.sh" "$@"
