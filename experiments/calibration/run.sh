#!/usr/bin/env bash
# Four shapes at half the parameters of SmolLM2's odd feed-forward maps, three starts each, no training.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/> experiments/calibration/run.sh [folder for the runs] [overrides of compress]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/calibration}"
shift || true
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
text="$KNCOMPRESS_DATA/wikitext2"
evaluate() {
  finished "$out/$1-evaluated" || python -m kncompress evaluate "model=$2" "${@:3}" "run_dir=$out/$1-evaluated" \
    "data.source=$text/wiki.test.raw" data.text_format=lines context=512 tokens=12000
}

evaluate dense smollm2
for shape in one_term two_by_two four_by_four outer_products; do
  for start in nearest calibrated sequential; do
    [ "$shape" != four_by_four ] || [ "$start" != sequential ] || continue  # long
    run="$shape-$start"
    finished "$out/$run" || python -m kncompress compress model=smollm2 "factors=$here/$shape.yaml" "start=$start" fit.sides=inputs \
      "data.source=$text" data.text_format=lines calibration.tokens=12288 calibration.context=512 "calibration.moments=$out/moments" \
      "run_dir=$out/$run" "$@"
    evaluate "$run" "$out/$run/model"
  done
done
python "$here/report.py" "$out" smollm2
