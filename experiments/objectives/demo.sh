#!/usr/bin/env bash
# Loss and rates of the demo: its student, fitted once, on a quarter of its text (140,288 tokens) by ILKD with and without
# cross-entropy and by the logits alone, one rate for all or the factors' own, two or three rates.
# Usage: KNCOMPRESS_DATA=<folder with text/> experiments/objectives/demo.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/demo_objectives}"
finished() { grep -qs '"status": "finished"' "$1/result.json"; }
finished "$out/start" || python -m kncompress compress model=mini data=sample factors=kngpt2 start=calibrated \
  "fit.symmetries=[hidden,heads,residual]" repair.passes=8 "run_dir=$out/start"
train() { # name, rate, overrides
  finished "$out/$1-$2" || python -m kncompress train +experiment=wikitext_ilkd "student=$out/start/model" "optimizer.lr=$2" \
    trainer.tokens=140288 trainer.keep=last samples.count=0 logger=csv "run_dir=$out/$1-$2" resume=auto "${@:3}"
  finished "$out/$1-$2-unread" || python -m kncompress evaluate "model=$out/$1-$2/model" "run_dir=$out/$1-$2-unread" \
    "data.source=$KNCOMPRESS_DATA/text/exl2_wiki.txt" tokens=16000
}
for rate in 3e-4 1e-3; do
  train ilkd "$rate" objective=ilkd optimizer.factor_rates=one
  train without_cross_entropy "$rate" objective=ilkd objective.cross_entropy=0 optimizer.factor_rates=one
  train logits "$rate" objective=logits optimizer.factor_rates=one
done
for rate in 3e-4 1e-3 1e-4; do
  train without_cross_entropy_scaled "$rate" objective=ilkd objective.cross_entropy=0 optimizer.factor_rates=scaled optimizer.warmup=0.1
done
python "$here/losses.py" "$out" "$here/demo.csv"
