#!/usr/bin/env bash
# Speed and memory at GPT-2 small's size, on this machine's CPUs.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/> experiments/throughput/run.sh [folder for the runs] [overrides of bench]
# Nothing else should run meanwhile. Products and generation are measured in both precisions, the rest in the one that
# training takes. About 25 minutes on two cores; started again, it goes on with the first part that is not finished.
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/throughput}"
shift || true
text="data.source=$KNCOMPRESS_DATA/wikitext2/wiki.train.tokens"
bench() {
  if grep -qs '"status": "finished"' "$out/$1/result.json"; then return; fi
  if [ -e "$out/$1/run.json" ]; then rm -r "$out/$1"; fi # interrupted: a figure that is half measured is none
  python -m kncompress bench "run_dir=$out/$1" "$text" "${@:2}"
}

bench product-fp32 'parts=[product]' precision=fp32 "$@"
bench product-bf16 'parts=[product]' precision=bf16 "$@"
bench speed 'parts=[product]' 'presets=[speed]' "$@"
bench step 'parts=[step]' precision=bf16 "$@"
bench generate-fp32 'parts=[generate]' 'runtimes=[transformers]' precision=fp32 "$@"
bench rest 'parts=[fit,generate,tokens,startup,memory]' 'runtimes=[transformers]' "$@"
[ -e "$out/growth.svg" ] || python "$here/growth.py" "$out/growth.csv"
cp "$out/growth.csv" "$out/growth.svg" "$here"
python "$here/report.py" "$out" "$here/results-cpu.csv"
