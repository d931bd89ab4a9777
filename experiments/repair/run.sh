#!/usr/bin/env bash
# Plans of equal size for the mini teacher at two budgets: what is predicted, what the fit gives, what a repair leaves.
# Usage: experiments/repair/run.sh [folder for the runs] [further overrides of the training runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/repair}"
shift || true
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
train() { # name, factors, start, overrides
  finished "$out/$1" || python -m kncompress train +experiment=wikitext_ilkd "factors=$2" "start=$3" trainer.tokens=98304 \
    "run_dir=$out/$1" "${@:4}"
}
plan() { # name, overrides
  finished "$out/$1-plan" || python -m kncompress plan model=mini data=sample "run_dir=$out/$1-plan" "${@:2}"
  cp "$out/$1-plan/plan.yaml" "$here/$1.yaml"
}

plan planner_68 budget=4739110
plan planner_speed_68 budget=4739110 speed=true "harm=$out/planner_68-plan"
plan planner_50 budget=3483648 "harm=$out/planner_68-plan"
plan planner_speed_50 budget=3483648 speed=true "harm=$out/planner_68-plan"
train kngpt2_68-nearest kngpt2 nearest "$@"
train kngpt2_68-sequential kngpt2 sequential "$@"
for budget in 68 50; do
  for shapes in planner planner_speed uniform kronecker; do
    train "${shapes}_$budget-sequential" "$here/${shapes}_$budget.yaml" sequential "$@"
  done
done
train planner_68-calibrated "$here/planner_68.yaml" calibrated "$@"
train planner_68-nearest "$here/planner_68.yaml" nearest "$@"
train uniform_68-calibrated "$here/uniform_68.yaml" calibrated "$@"
train uniform_68-nearest "$here/uniform_68.yaml" nearest "$@"
python "$here/report.py" "$out"
