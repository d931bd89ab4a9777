#!/usr/bin/env bash
# Two hours of the mini teacher's distillation at lowest priority, beside the same killed once in the middle.
# Usage: experiments/soak/run.sh [folder for the runs] [steps] [further overrides of train]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/soak}"
steps="${2:-3000}"
export OMP_NUM_THREADS=1
nice -n 19 python "$here/soak.py" "$out" "$steps" "${@:3}"
cp "$out/samples.csv" "$out/soak.json" "$out/soak.svg" "$here"
