#!/usr/bin/env bash
# The paper's tables from the hub: GPT-2 small, 10% of OpenWebText, WikiText-103, GLUE. Finished parts are not repeated,
# stopped ones go on. `costs.py` says what it takes. Overrides of every training may follow, such as trainer=ddp.
# DRY=1: the same commands without the hub, GPT-2 small's sizes with random weights, two steps, a smoke run of GLUE.
# Usage: experiments/paper/run.sh [folder for the runs] [overrides of train]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/paper}"
shift || true
dry="${DRY:-}"
teacher=gpt2 distilled=distilbert/distilgpt2 text=(data=openwebtext data.fraction=0.1) wiki=(data=wikitext103) short=() few=()
tokenised=(data.source=hub:Salesforce/wikitext:wikitext-103-v1) wikitext2=(data.source=hub:Salesforce/wikitext:wikitext-2-v1)
lambada=hub:EleutherAI/lambada_openai
glue=(data.source=hub tasks=all "seeds=${SEEDS:-5}" objective=glue_ilkd)
if [ -n "$dry" ]; then
  [ -e "$out/teacher" ] || python "$here/random_teacher.py" "$out/teacher" "$out/distilled" "$out/passages.txt"
  teacher="$out/teacher" distilled="$out/distilled" text=(data=sample) wiki=(data=sample) tokenised=(data=sample) wikitext2=(data=sample)
  lambada="$out/passages.txt" few=(tokens=1024 context=128)
  short=(trainer.steps=2 trainer.batch_tokens=512 trainer.micro_batch_tokens=512 trainer.validation_tokens=512
    trainer.test_tokens=512 data.context=128 calibration.tokens=512 calibration.context=128 fit.sweeps=1 logger=csv samples.count=0)
  glue=(+experiment=glue_ilkd 'baselines={}' seeds=1 fine_tuning.epochs=1 data.train_examples=16)
fi
finished() { grep -qs '"status": "finished"' "$1/result.json"; }
train() { # name, overrides
  finished "$out/$1" || python -m kncompress train +experiment=openwebtext_ilkd "model=$teacher" "${text[@]}" "${short[@]}" \
    resume=auto "run_dir=$out/$1" "${@:2}"
}
paper=(start=nearest fit.symmetries=[] repair.passes=0 objective.logits=0)

# Light pre-training: the paper's recipe, the same shapes by our fits, as many parameters by our planner, half of the layers.
train kngpt2 "${paper[@]}" "$@"
train ours "$@"
train planner factors=dense budget=83907530 start=calibrated fit.symmetries=[] repair.passes=0 objective=logits \
  optimizer.factor_rates=scaled "$@"
train layerdrop factors=layerdrop "${paper[@]}" objective=logits "$@"

# Perplexity without fine-tuning, by the protocol of Krony-PT's and KnGPT2's tables (test text as tokenised in the corpus,
# windows of 1,024 without overlap, mean of the window losses), and LAMBADA.
evaluate() { # name, model, overrides
  finished "$out/scores/$1" || python -m kncompress evaluate "model=$2" "run_dir=$out/scores/$1" "${@:3}"
}
for name in teacher distilled kngpt2 ours planner layerdrop; do
  case "$name" in teacher) model="$teacher" ;; distilled) model="$distilled" ;; *) model="$out/$name/model" ;; esac
  evaluate "$name-wikitext103" "$model" "${tokenised[@]}" data.text_format=lines "${few[@]}"
  evaluate "$name-wikitext2" "$model" "${wikitext2[@]}" data.text_format=lines "${few[@]}"
  evaluate "$name-lambada" "$model" "lambada=$lambada"
done

# Perplexity after fine-tuning on WikiText-103, the paper's protocol: cross-entropy alone, one epoch.
for name in teacher distilled kngpt2 ours planner layerdrop; do
  case "$name" in teacher) model="$teacher" ;; distilled) model="$distilled" ;; *) model="$out/$name/model" ;; esac
  finished "$out/tuned-$name" || python -m kncompress train +experiment=gpt2_wikitext_ilkd "model=$model" "${wiki[@]}" \
    factors=dense objective=cross_entropy start=nearest fit.symmetries=[] repair.passes=0 "${short[@]}" resume=auto \
    "run_dir=$out/tuned-$name" "$@"
done

# GLUE: the teacher, then students plain and by ILKD.
for name in kngpt2 ours planner layerdrop; do
  finished "$out/glue-$name" || python -m kncompress glue "teacher=$teacher" "student=$out/$name/model" "${glue[@]}" \
    resume=auto "run_dir=$out/glue-$name"
done
python "$here/report.py" "$out" "$out/results.csv"
