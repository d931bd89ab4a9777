#!/usr/bin/env bash
# SmolLM2-135M at 0.667, 0.8 and 0.9 of all its unique parameters, no training: planned by gradients, calibrated by both sides
# on three kinds of text (one plan's harms serve all budgets); at 0.667 also on WikiText-2 alone and on the model's own text.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/ and text/> experiments/two_sided/budgets.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/two_sided_budgets}"
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
wiki="$KNCOMPRESS_DATA/wikitext2" text="$KNCOMPRESS_DATA/text"
size=(calibration.tokens=12288 calibration.context=512)
mix=("data.source=[$wiki/wiki.train.tokens,$text/gitenberg_pd.txt,$text/gsa18f_cc0.txt]" "calibration.moments=$out/moments")

evaluate() { # name, model
  score() { finished "$out/$1" || python -m kncompress evaluate "model=$2" "run_dir=$out/$1" context=512 tokens=12000 "${@:3}"; }
  score "$1-published" "$2" "data.source=$wiki/wiki.test.raw" data.text_format=lines
  score "$1-prose" "$2" "data.source=$wiki/wiki.test.raw"
  score "$1-web" "$2" "data.source=$text/digitalgov_cc0.txt"
}
compress() { # name, budget, overrides
  finished "$out/$1" || python -m kncompress compress model=smollm2 "factors=$out/plan_$2/plan.yaml" "${size[@]}" \
    "run_dir=$out/$1" "${@:3}"
  evaluate "$1" "$out/$1/model"
}
harms=()
for budget in 0.667 0.8 0.9; do
  finished "$out/plan_$budget" || python -m kncompress plan model=smollm2 "${size[@]}" "${mix[@]}" harms=gradients sums=false \
    "budget=$budget" measure=false "run_dir=$out/plan_$budget" "${harms[@]}"
  harms=("harm=$out/plan_0.667")
  compress "calibrated_$budget" "$budget" "${mix[@]}"
done
evaluate dense smollm2
compress wikitext2_0.667 0.667 "data.source=$wiki/wiki.train.tokens"
compress model_0.667 0.667 data.source=model data.own.tokens=16384
compress sequential_0.667 0.667 "${mix[@]}" start=sequential
compress repaired_0.667 0.667 "${mix[@]}" repair.passes=2
compress repaired_8_0.667 0.667 "${mix[@]}" repair.passes=8
for ridge in 0.01 1; do # of the gradients' moments; 0.1 is the default
  compress "ridge_${ridge}_0.667" 0.667 "${mix[@]}" "fit.output_ridge=$ridge"
done
python "$here/by_text.py" "$out" "$here/budgets.csv"
