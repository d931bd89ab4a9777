#!/usr/bin/env bash
# SmolLM2-135M at two thirds of all its unique parameters, no training: fits to the inputs and fits to both sides.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/ and text/> experiments/two_sided/run.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/two_sided}"
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
text="$KNCOMPRESS_DATA/wikitext2"
fit=("data.source=$text/wiki.train.tokens" calibration.tokens=12288 calibration.context=512 "calibration.moments=$out/moments")

evaluate() { # name, model, overrides
  finished "$out/$1-wikitext2" || python -m kncompress evaluate "model=$2" "run_dir=$out/$1-wikitext2" \
    "data.source=$text/wiki.test.raw" data.text_format=lines context=512 tokens=12000 "${@:3}"
  finished "$out/$1-web" || python -m kncompress evaluate "model=$2" "run_dir=$out/$1-web" \
    "data.source=$KNCOMPRESS_DATA/text/digitalgov_cc0.txt" context=512 tokens=12000 "${@:3}"
}
compress() { # name, factors, start, overrides
  finished "$out/$1" || python -m kncompress compress model=smollm2 "factors=$2" "start=$3" "${fit[@]}" "run_dir=$out/$1" "${@:4}"
  evaluate "$1" "$out/$1/model"
}
plan() { # name, overrides
  finished "$out/$1-plan" || python -m kncompress plan model=smollm2 "${fit[@]}" "run_dir=$out/$1-plan" measure=false "${@:2}"
  sed "/^# python/d; s|$KNCOMPRESS_DATA|\$KNCOMPRESS_DATA|g" "$out/$1-plan/plan.yaml" > "$here/$1.yaml"
}

evaluate dense smollm2
compress uniform_packed-both "$here/uniform_packed.yaml" calibrated fit.sides=both
plan gradients fit.sides=both harms=gradients sums=false budget=0.667
compress gradients "$here/gradients.yaml" calibrated fit.sides=both
compress gradients-sequential "$here/gradients.yaml" sequential fit.sides=both
compress gradients-sequential-inputs "$here/gradients.yaml" sequential fit.sides=inputs
compress uniform_packed-inputs "$here/uniform_packed.yaml" calibrated fit.sides=inputs
for sides in inputs both; do
  compress "uniform-$sides" "$here/uniform.yaml" calibrated "fit.sides=$sides"
done
for bits in 8 5 4; do # the original in as many bytes: in 5 bits it takes about those of the planned model in 8
  evaluate "dense_$bits" smollm2 "bits=$bits"
done
evaluate gradients_8 "$out/gradients/model" bits=8
python "$here/report.py" "$out"
