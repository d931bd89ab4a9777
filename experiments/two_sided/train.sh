#!/usr/bin/env bash
# Does packed low rank train as well as the unpacked pair? The mini teacher at 68% of its parameters, 98,304 tokens.
# Usage: KNCOMPRESS_DATA=<folder with text/> experiments/two_sided/train.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/two_sided_train}"
for rates in one scaled; do
  for name in unpacked packed; do
    plan="$here/mini_packed.yaml"
    [ "$name" = packed ] || plan="$here/../repair/uniform_68.yaml"
    run="$out/$name-$rates"
    [ -f "$run/model/config.json" ] || python -m kncompress train +experiment=wikitext_ilkd "factors=$plan" start=sequential \
      "fit.symmetries=[]" repair.passes=0 trainer.tokens=98304 "optimizer.factor_rates=$rates" logger=none "run_dir=$run" resume=auto
    python -m kncompress evaluate "model=$run/model" "data.source=$KNCOMPRESS_DATA/text/exl2_wiki.txt" tokens=16000
  done
done
