#!/usr/bin/env bash
# SmolLM2-135M, two students of experiments/smollm2 (planner and layerdrop, about two thirds of its parameters), on five
# GLUE tasks: plain fine-tuning, ILKD, the teacher's answers alone, and ILKD without each of its terms.
# Usage: KNCOMPRESS_DATA=<folder with glue/> experiments/glue_smollm2/run.sh [folder for the runs] [runs of experiments/smollm2]
# SEEDS (1), TRAIN_EXAMPLES (200 a task; null: all), EPOCHS (2) and SUITES may be set. A stopped run goes on where it was.
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/glue_smollm2}"
students="${2:-runs/smollm2}"
terms="embedding attention hidden feed_forward"
suite() { # name, overrides; the teachers are fine-tuned by the first one
  grep -qs '"status": "finished"' "$out/$1/result.json" || python -m kncompress glue teacher=smollm2 \
    "student=$students/planner/model" "data.source=$KNCOMPRESS_DATA/glue" "tasks=[cola,sst2,mrpc,stsb,rte]" \
    "seeds=${SEEDS:-1}" "data.train_examples=${TRAIN_EXAMPLES:-200}" "fine_tuning.epochs=${EPOCHS:-2}" \
    optimizer.lr=1e-4 fine_tuning.batch_size=16 optimizer.factor_rates=scaled "run_dir=$out/$1" resume=auto "${@:2}"
}
suites="${SUITES:-main logits without_embedding without_attention without_hidden without_feed_forward without_cross_entropy}"
found=()
for name in $suites; do
  case "$name" in
    main) suite main "baselines.layerdrop=$students/layerdrop/model" ;;
    logits) suite logits "training=[ilkd]" $(for term in $terms; do echo "objective.$term=0"; done) ;;
    without_*) suite "$name" "training=[ilkd]" "objective.${name#without_}=0" ;;
  esac
  [ "$name" = main ] || found+=("$name=$out/$name")
done
python "$here/../glue/report.py" "$here/results.csv" "$out/main" "${found[@]}"
