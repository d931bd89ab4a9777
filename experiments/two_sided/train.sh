#!/usr/bin/env bash
# Does the lead of a better start last? The mini teacher at 68% of its parameters, 98,304 tokens: packed against unpacked low
# rank by ILKD; fits to both sides against fits to the inputs, packed and unpacked, by the logits alone.
# Usage: KNCOMPRESS_DATA=<folder with text/> experiments/two_sided/train.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/two_sided_train}"
train() { # name of the run, packed or unpacked, overrides
  local plan="$here/mini_packed.yaml" run="$out/$1"
  [ "$2" = packed ] || plan="$here/../repair/uniform_68.yaml"
  [ -f "$run/model/config.json" ] || python -m kncompress train +experiment=wikitext_ilkd "factors=$plan" "fit.symmetries=[]" \
    repair.passes=0 trainer.tokens=98304 logger=none "run_dir=$run" resume=auto "${@:3}"
  [ -f "$run/unread/result.json" ] || python -m kncompress evaluate "model=$run/model" "run_dir=$run/unread" \
    "data.source=$KNCOMPRESS_DATA/text/exl2_wiki.txt" tokens=16000
}
for name in unpacked packed; do
  for rates in one scaled; do
    train "$name-$rates" "$name" objective=ilkd start=sequential "optimizer.factor_rates=$rates"
  done
  for sides in inputs both; do
    train "$name-logits-$sides" "$name" start=calibrated objective=logits optimizer.factor_rates=scaled "fit.sides=$sides"
  done
done
