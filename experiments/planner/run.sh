#!/usr/bin/env bash
# Two thirds of all unique parameters of SmolLM2-135M, no training: the paper's recipe, uniform outer products, the planner.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/> experiments/planner/run.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/planner}"
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
text="$KNCOMPRESS_DATA/wikitext2"
fit=("data.source=$text/wiki.train.tokens" data.text_format=lines calibration.tokens=12288 calibration.context=512 "calibration.moments=$out/moments")

evaluate() {
  finished "$out/$1-evaluated" || python -m kncompress evaluate "model=$2" "run_dir=$out/$1-evaluated" \
    "data.source=$text/wiki.test.raw" data.text_format=lines context=512 tokens=12000
}
compress() { # name, factors, start
  finished "$out/$1" || python -m kncompress compress model=smollm2 "factors=$2" "start=$3" fit.sides=inputs "${fit[@]}" "run_dir=$out/$1"
  evaluate "$1" "$out/$1/model"
}
plan() { # name, overrides
  finished "$out/$1-plan" || python -m kncompress plan model=smollm2 "${fit[@]}" "run_dir=$out/$1-plan" harms=measured "${@:2}"
  sed "/^# python/d; s|$KNCOMPRESS_DATA|\$KNCOMPRESS_DATA|g" "$out/$1-plan/plan.yaml" > "$here/$1.yaml"
  compress "$1" "$here/$1.yaml" calibrated
}

evaluate dense smollm2
plan planner budget=0.667 validation_tokens=4096
compress planner-sequential "$here/planner.yaml" sequential
for shapes in uniform uniform_dense_embedding uniform_3x3; do
  compress "$shapes" "$here/$shapes.yaml" calibrated
done
compress uniform-sequential "$here/uniform.yaml" sequential
compress kngpt2-nearest kngpt2 nearest
compress kngpt2-calibrated kngpt2 calibrated
plan planner_speed budget=0.667 speed=true "harm=$out/planner-plan"
plan planner_0.8 budget=0.8 "harm=$out/planner-plan"
compress uniform_2x32_dense_embedding "$here/uniform_2x32_dense_embedding.yaml" calibrated
python "$here/report.py" "$out"
