#!/usr/bin/env bash
# Speed and memory at GPT-2 small's size, on this machine's CPUs.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/> experiments/throughput/run.sh [folder for the runs] [overrides of bench]
# Nothing else should run meanwhile. Products are measured in both precisions, the rest in the one that training takes.
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/throughput}"
shift || true
text="data.source=$KNCOMPRESS_DATA/wikitext2/wiki.train.tokens"
bench() {
  grep -qs '"status": "finished"' "$out/$1/result.json" || python -m kncompress bench "run_dir=$out/$1" "$text" "${@:2}"
}

bench product-fp32 'parts=[product]' precision=fp32 "$@"
bench product-bf16 'parts=[product]' precision=bf16 "$@"
bench speed 'parts=[product]' 'presets=[speed]' "$@"
bench step 'parts=[step]' precision=bf16 "$@"
bench rest 'parts=[fit,generate,tokens,startup,memory]' "$@"
python "$here/report.py" "$out" "$here/results-cpu.csv"
