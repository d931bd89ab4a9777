#!/usr/bin/env bash
# Starts and plans of equal size for the mini teacher at two budgets: predicted KL, KL of the fit, KL after a short training.
# Usage: experiments/repair/run.sh [folder for the runs] [further overrides of the training runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/repair}"
shift || true
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
train() { # name, factors, start, overrides
  finished "$out/$1" || python -m kncompress train +experiment=wikitext_ilkd objective=ilkd "factors=$2" "start=$3" fit.sides=inputs \
    fit.symmetries=[] repair.passes=0 logger=csv "run_dir=$out/$1" "${@:4}"
}
plan() { # name, overrides
  finished "$out/$1-plan" || python -m kncompress plan model=mini data=sample "run_dir=$out/$1-plan" harms=measured "${@:2}"
  sed "/^# python/d" "$out/$1-plan/plan.yaml" > "$here/$1.yaml"
}
short=trainer.tokens=98304
all='fit.symmetries=[hidden,heads,residual]'

plan planner_68 budget=4739110
plan planner_50 budget=3483648 "harm=$out/planner_68-plan"
train kngpt2_68-nearest kngpt2 nearest $short "$@"
train kngpt2_68-nearest-symmetries kngpt2 nearest $short "$all" "$@"
train kngpt2_68-nearest-symmetries-repair kngpt2 nearest $short "$all" repair.passes=2 "$@"
train kngpt2_68-calibrated-symmetries-repair kngpt2 calibrated $short "$all" repair.passes=2 "$@"
train kngpt2_68-sequential-symmetries kngpt2 sequential $short "$all" "$@"
for budget in 68 50; do
  for shapes in planner uniform kronecker; do
    train "${shapes}_$budget-sequential" "$here/${shapes}_$budget.yaml" sequential $short "$@"
  done
done
train planner_68-sequential-repair "$here/planner_68.yaml" sequential $short repair.passes=2 "$@"
train full_kngpt2-nearest kngpt2 nearest "$@"
train full_kngpt2-calibrated-symmetries-repair kngpt2 calibrated "$all" repair.passes=2 "$@"
train full_planner-sequential "$here/planner_68.yaml" sequential "$@"
plan planner_both_68 budget=4739110 # planned and fitted as today's defaults are: by both sides, packed low rank
train full_planner_both-calibrated "$here/planner_both_68.yaml" calibrated fit.sides=both optimizer.factor_rates=scaled "$@"
python "$here/report.py" "$out"
