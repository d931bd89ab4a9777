#!/usr/bin/env bash
# Shapes against each other: the mini teacher at 68% and at 50% of its unique parameters, 98,304 tokens of the sample by the
# teacher's logits, the same fit (both sides), rates and order for all; two further seeds of the best four at 68%.
# Usage: KNCOMPRESS_DATA=<folder with text/> experiments/shapes/run.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/shapes}"
mkdir -p "$out"
finished() { grep -qs '"status": "finished"' "$1/result.json"; }
train() { # name of the run, factors, overrides
  finished "$out/$1" || python -m kncompress train +experiment=wikitext_ilkd "factors=$2" objective=logits start=calibrated \
    fit.symmetries=[] repair.passes=0 trainer.tokens=98304 trainer.keep=last optimizer.factor_rates=scaled \
    optimizer.warmup=0.1 "calibration.moments=$out/moments" logger=csv "run_dir=$out/$1" resume=auto "${@:3}"
  finished "$out/$1-unread" || python -m kncompress evaluate "model=$out/$1/model" "run_dir=$out/$1-unread" \
    "data.source=$KNCOMPRESS_DATA/text/exl2_wiki.txt" tokens=16000
}
kinds="sum_2x2 sum_2x4 sum_4x4 low_rank packed"
sizes=(68 4739110 50 3483648)
for i in 0 2; do
  size="${sizes[$i]}" parameters="${sizes[$((i + 1))]}"
  for kind in $kinds; do
    [ -s "$out/$kind-$size.yaml" ] || python "$here/shapes.py" "$kind" "$parameters" > "$out/$kind-$size.yaml"
    train "$kind-$size-0" "$out/$kind-$size.yaml"
  done
  plan="$out/plan-$size"
  finished "$plan" || python -m kncompress plan model=mini data=sample "budget=$parameters" measure=false "run_dir=$plan" \
    "calibration.moments=$out/plan-moments"
  train "planner-$size-0" "$plan/plan.yaml"
done
train kngpt2-68-0 kngpt2
train kngpt2_nearest-68-0 kngpt2 start=nearest
train kngpt2-50-0 kngpt2 factors.layers=all
train kngpt2_nearest-50-0 kngpt2 factors.layers=all start=nearest
train kronypt-68-0 kronypt_81m
train layerdrop-68-0 layerdrop start=nearest
train layerdrop-50-0 layerdrop factors.depth=2 start=nearest
for name in $(python "$here/report.py" --best "$out"); do
  case "$name" in
    planner) factors="$out/plan-68/plan.yaml" ;; kngpt2) factors=kngpt2 ;; kronypt) factors=kronypt_81m ;;
    layerdrop) factors=layerdrop ;; *) factors="$out/$name-68.yaml" ;;
  esac
  for seed in 1 2; do
    train "$name-68-$seed" "$factors" "seed=$seed" "data.seed=$seed"
  done
done
python "$here/report.py" "$out"
