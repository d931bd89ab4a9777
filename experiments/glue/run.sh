#!/usr/bin/env bash
# Mini teacher, its KnGPT2 student and half of its layers, both pre-trained by ILKD, on five GLUE tasks.
# Usage: KNCOMPRESS_DATA=<folder with glue/> experiments/glue/run.sh [folder for the runs] [overrides of glue]
# SEEDS (1) and TRAIN_EXAMPLES (1200 a task; null: all) may be set. A stopped run goes on where it was.
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/glue}"
shift || true
seeds="${SEEDS:-1}"
train() { [ -e "$out/$1/model" ] || python -m kncompress train +experiment=wikitext_ilkd objective=ilkd "run_dir=$out/$1" resume=auto "${@:2}"; }

train student factors=kngpt2
train layerdrop factors=layerdrop
suite="$out/suite-$seeds"
if ! grep -qs '"status": "finished"' "$suite/result.json"; then
  python -m kncompress glue teacher=mini "student=$out/student/model" "baselines.layerdrop=$out/layerdrop/model" \
    "data.source=$KNCOMPRESS_DATA/glue" "tasks=[cola,sst2,mrpc,stsb,rte]" "seeds=$seeds" save_models=true \
    "data.train_examples=${TRAIN_EXAMPLES:-1200}" optimizer.lr=1e-3 fine_tuning.epochs=3 \
    "run_dir=$suite" resume=auto "$@"
fi
python "$here/report.py" "$here/results.csv" "$suite"
[ -e "$out/throughput.json" ] || python "$here/throughput.py" "$out/throughput.json"
