#!/usr/bin/env bash
# The same on a GPU: bf16, 16 sequences of 512 tokens. Results carry the GPU's name.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/> experiments/throughput/gpu.sh [folder for the runs] [overrides of bench]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/throughput-gpu}"
shift || true
text="data.source=$KNCOMPRESS_DATA/wikitext2/wiki.train.tokens"
gpu=(accelerator=gpu precision=bf16 tokens=8192)
bench() {
  if grep -qs '"status": "finished"' "$out/$1/result.json"; then return; fi
  if [ -e "$out/$1/run.json" ]; then rm -r "$out/$1"; fi # interrupted: a figure that is half measured is none
  python -m kncompress bench "run_dir=$out/$1" "$text" "${@:2}"
}

bench product 'parts=[product]' "${gpu[@]}" "$@"
bench step 'parts=[step]' "${gpu[@]}" "$@"
bench rest 'parts=[fit,generate,tokens,startup,memory]' "${gpu[@]}" "$@"
python "$here/report.py" "$out" "$here/results-gpu.csv"
