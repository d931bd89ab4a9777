#!/usr/bin/env bash
# Which text should a fit read? SmolLM2-135M at 0.667 of all its unique parameters, no training: the same shapes, calibrated
# by both sides on as many tokens of WikiText-2, of a mix of kinds, of the model's own samples, and of all of these.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/ and text/> experiments/two_sided/texts.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/calibration_texts}"
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
wiki="$KNCOMPRESS_DATA/wikitext2" text="$KNCOMPRESS_DATA/text"
mix="$wiki/wiki.train.tokens,$text/gitenberg_pd.txt,$text/gsa18f_cc0.txt"

evaluate() { # name, model
  score() { finished "$out/$1" || python -m kncompress evaluate "model=$2" "run_dir=$out/$1" context=512 tokens=12000 "${@:3}"; }
  score "$1-published" "$2" "data.source=$wiki/wiki.test.raw" data.text_format=lines
  score "$1-prose" "$2" "data.source=$wiki/wiki.test.raw"
  score "$1-web" "$2" "data.source=$text/digitalgov_cc0.txt"
  score "$1-wikipedia" "$2" "data.source=$text/exl2_wiki.txt"
}
fit() { # name, source, overrides
  finished "$out/$1" || python -m kncompress compress model=smollm2 "factors=$here/gradients.yaml" start=calibrated \
    fit.sides=both "data.source=$2" calibration.tokens=12288 calibration.context=512 "run_dir=$out/$1" "${@:3}"
  evaluate "$1" "$out/$1/model"
}

evaluate dense smollm2
fit wikitext2 "$wiki/wiki.train.tokens"
fit mix "[$mix]"
fit model model
fit mix_and_model "[$mix,model]"
python "$here/by_text.py" "$out" "$here/texts.csv"
