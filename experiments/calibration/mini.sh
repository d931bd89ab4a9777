#!/usr/bin/env bash
# The same shapes and starts on the bundled teacher, and what the number of calibration tokens does. Needs no download.
# Usage: experiments/calibration/mini.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/calibration-mini}"
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
evaluate() {
  finished "$out/$1-evaluated" || python -m kncompress evaluate "model=$2" "run_dir=$out/$1-evaluated" data=sample tokens=40000
}
compress() { # name, factors, start, overrides
  finished "$out/$1" || python -m kncompress compress model=mini "factors=$2" "start=$3" data=sample fit.sides=inputs "run_dir=$out/$1" "${@:4}"
  evaluate "$1" "$out/$1/model"
}

evaluate dense mini
for shape in one_term two_by_two four_by_four outer_products; do
  factors="$here/$shape.yaml"
  [ "$shape" != outer_products ] || factors="$here/outer_products_mini.yaml"
  for start in nearest calibrated sequential; do
    compress "$shape-$start" "$factors" "$start" calibration.tokens=12288
  done
done
for tokens in 1024 4096 16384 65536; do
  for start in calibrated sequential; do
    compress "one_term-$start-$tokens" "$here/one_term.yaml" "$start" "calibration.tokens=$tokens"
    compress "outer_products-$start-$tokens" "$here/outer_products_mini.yaml" "$start" "calibration.tokens=$tokens"
  done
done
python "$here/report.py" "$out" mini
