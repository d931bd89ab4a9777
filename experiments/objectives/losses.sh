#!/usr/bin/env bash
# Which loss? The mini teacher at 68% of its parameters (packed low rank, fitted to both sides), 98,304 tokens of the sample
# by each objective, each with the best of three rates: of 24,576 tokens, by the validation text.
# Usage: KNCOMPRESS_DATA=<folder with text/> experiments/objectives/losses.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/losses}"
common=(+experiment=wikitext_ilkd "factors=$here/../two_sided/mini_packed.yaml" fit.symmetries=[] repair.passes=0
  "calibration.moments=$out/moments" optimizer.factor_rates=scaled optimizer.warmup=0.1 trainer.keep=last samples.count=0
  logger=csv)
finished() { grep -qs '"status": "finished"' "$1/result.json"; }
train() { # name, rate, tokens, overrides
  finished "$out/$1" || python -m kncompress train "${common[@]}" "run_dir=$out/$1" resume=auto "optimizer.lr=$2" \
    "trainer.tokens=$3" "${words[@]}" "${@:4}"
}
objective() { # name, overrides
  words=("${@:2}")
  for rate in 1e-4 3e-4 1e-3; do
    train "search/$1-$rate" "$rate" 24576 trainer.validate_every=6 trainer.test_tokens=1024
  done
  best="$(python "$here/losses.py" --rate "$out/search" "$1")"
  train "$1-$best" "$best" 98304
  finished "$out/$1-$best-unread" || python -m kncompress evaluate "model=$out/$1-$best/model" "run_dir=$out/$1-$best-unread" \
    "data.source=$KNCOMPRESS_DATA/text/exl2_wiki.txt" tokens=16000
}
objective cross_entropy objective=cross_entropy
objective logits objective=logits
objective logits_at_2 objective=logits objective.temperature=2
objective logits_and_cross_entropy objective=logits objective.cross_entropy=1
objective ilkd objective=ilkd                       # with the logits term of KroneckerBERT
objective ilkd_paper objective=ilkd objective.logits=0 # as in KnGPT2
for term in embedding attention feed_forward cross_entropy; do
  objective "ilkd_without_$term" objective=ilkd "objective.$term=0"
done
python "$here/losses.py" "$out" "$here/losses.csv"
