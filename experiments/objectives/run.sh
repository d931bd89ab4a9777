#!/usr/bin/env bash
# The same factors, tokens and data under two objectives, and the teacher itself trained on those tokens.
# Usage: experiments/objectives/run.sh [folder for the runs] [further overrides for every run]
set -euo pipefail
out="${1:-runs/objectives}"
shift || true
paper=(start=nearest fit.symmetries=[] repair.passes=0)
train() { python -m kncompress train +experiment=wikitext_ilkd "${paper[@]}" "run_dir=$out/$1" "${@:2}"; }

train ilkd objective=ilkd "$@"
train cross_entropy objective=cross_entropy "$@"
train dense objective=cross_entropy factors=dense "$@"
python experiments/objectives/report.py "$out"
