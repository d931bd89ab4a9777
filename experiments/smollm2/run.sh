#!/usr/bin/env bash
# SmolLM2-135M at two thirds of all its unique parameters: ways to get there, each repaired by the same distillation.
# A small search (16 steps, WikiText-2's validation text) finds the rate of each. Finished runs are not repeated, stopped
# ones go on from their checkpoints.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/ and text/> experiments/smollm2/run.sh [folder for the runs]
# TOKENS: training tokens of each; STUDENTS: which; STEP=search or STEP=train to stop after that.
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/smollm2}"
tokens="${TOKENS:-262144}"
students="${STUDENTS:-planner layerdrop uniform kronecker kngpt2 repaired}"
wiki="$KNCOMPRESS_DATA/wikitext2" text="$KNCOMPRESS_DATA/text"
unseen="$text/digitalgov_cc0.txt"
mix=("data.source=[$wiki/wiki.train.tokens,$text/gitenberg_pd.txt,$text/gsa18f_cc0.txt]"
  "data.validation=$wiki/wiki.valid.tokens" "data.test=$wiki/wiki.test.raw")
fit=(model=smollm2 "${mix[@]}" calibration.tokens=12288 calibration.context=512 "calibration.moments=$out/moments")
run=(model=smollm2 "${mix[@]}" objective=logits "objective.cache=$out/cache" data.context=512 trainer.batch_tokens=1024
  trainer.micro_batch_tokens=512 trainer.keep=last optimizer.factor_rates=scaled optimizer.warmup=0.1 logger=csv)

finished() { grep -qs '"status": "finished"' "$1/result.json"; }
start() { # student: fitted once, for the search too
  case "$1" in
    planner) words=("factors=$here/../two_sided/three_kinds.yaml" start=calibrated) ;;
    repaired) words=("factors=$here/../two_sided/three_kinds.yaml" start=calibrated repair.passes=2) ;; # rate of planner
    layerdrop) words=(factors=layerdrop factors.depth=18) ;;
    uniform) words=("factors=$here/../two_sided/uniform.yaml" start=calibrated fit.sides=inputs) ;;
    kronecker) words=("factors=$here/../planner/uniform_2x32_dense_embedding.yaml" start=calibrated) ;;
    kngpt2) words=(factors=kngpt2) ;;
  esac
  finished "$out/starts/$1" || python -m kncompress compress "${fit[@]}" "${words[@]}" "run_dir=$out/starts/$1"
}
train() { # name, student, overrides
  finished "$out/$1" && return
  start "$2"
  python -m kncompress train "${run[@]}" "student=$out/starts/$2/model" resume=auto "run_dir=$out/$1" "${@:3}"
}
best() { python "$here/report.py" --rate "$out/search" "$1"; }
search() { # student: rates of the first steps, and the next one where the lowest or highest of these is the best
  for rate in 3e-4 1e-3; do first "$1" "$rate"; done
  case "$(best "$1")" in
    3e-4 | 1e-4) first "$1" 1e-4 ;;
    *) first "$1" 3e-3 ;;
  esac
}
first() { # student, rate
  train "search/$1-$2" "$1" "optimizer.lr=$2" trainer.steps=16 trainer.validate_every=16 trainer.validation_tokens=8192 \
    trainer.test_tokens=1024 samples.count=0
  rm -rf "$out/search/$1-$2/checkpoints" "$out/search/$1-$2/model" # 2.4 GB
}

for name in $students; do
  [ "$name" = repaired ] || search "$name"
done
[ "${STEP:-}" = search ] && exit
for name in $students; do
  train "$name" "$name" "optimizer.lr=$(best "${name/repaired/planner}")" "trainer.tokens=$tokens" "unseen=$unseen" \
    trainer.validate_every=32 trainer.validation_tokens=4096 trainer.test_tokens=12000
done
[ "${STEP:-}" = train ] && exit
original="$out/original/model" # its weights as a folder, that `compare` takes
finished "$out/original" || python -m kncompress export model=smollm2 format=dense "run_dir=$out/original"
evaluated() { # name, words
  finished "$out/$1" || python -m kncompress evaluate "run_dir=$out/$1" "${@:2}"
}
for bits in 5 4; do # the original in as many bytes as a student has in 8 and in 6 bits
  evaluated "dense_$bits-wikitext2" "model=$original" "compare=$original" "bits=$bits" "data.source=$wiki/wiki.test.raw" \
    context=512 tokens=12000
  evaluated "dense_$bits-unseen" "model=$original" "compare=$original" "bits=$bits" "data.source=$unseen" context=512 tokens=12000
done
tasks="$out/tasks"
[ -s "$tasks/passages.txt" ] || python "$here/tasks.py" "$unseen" "$KNCOMPRESS_DATA/glue/SST-2/dev.tsv" "$tasks"
evaluated dense-tasks "model=$original" "tasks=[$tasks/next_sentence.yaml,$tasks/sst2.yaml]"
evaluated dense-passages "model=$original" "lambada=$tasks/passages.txt"
for name in $students; do # in 8 bits, and on the tasks
  model="model=$out/$name/model"
  evaluated "$name-8bits" "$model" "compare=$original" bits=8 "data.source=$unseen" context=512 tokens=12000
  evaluated "$name-tasks" "$model" "compare=$original" "tasks=[$tasks/next_sentence.yaml,$tasks/sst2.yaml]"
  evaluated "$name-passages" "$model" "lambada=$tasks/passages.txt"
done
python "$here/report.py" "$out"
