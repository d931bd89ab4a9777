#!/usr/bin/env bash
# What does it save to draw the teacher's outputs once? Logits distillation with the teacher beside the student, and from a
# cache of 12 tokens for each of its distributions: the mini teacher (98,304 tokens) and SmolLM2-135M (16 steps of 1,024).
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/> experiments/throughput/cache.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/throughput_cache}"
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
small=(+experiment=wikitext_ilkd objective=logits start=nearest fit.symmetries=[] repair.passes=0 trainer.tokens=98304
  optimizer.factor_rates=scaled)
large=(model=smollm2 "factors=$here/../two_sided/gradients.yaml" start=nearest objective=logits data.context=512
  "data.source=$KNCOMPRESS_DATA/wikitext2/wiki.train.tokens" "data.validation=$KNCOMPRESS_DATA/wikitext2/wiki.valid.tokens"
  "data.test=$KNCOMPRESS_DATA/wikitext2/wiki.test.raw" trainer.batch_tokens=1024 trainer.micro_batch_tokens=1024
  trainer.steps=16 trainer.validate_every=16 trainer.validation_tokens=1024 trainer.test_tokens=1024 optimizer.lr=3e-4
  optimizer.factor_rates=scaled)
train() { # name, overrides
  finished "$out/$1" || python -m kncompress train "${@:2}" logger=csv samples.count=0 "run_dir=$out/$1"
}
for model in small large; do
  declare -n words="$model"
  train "$model-live" "${words[@]}"
  train "$model-drawing" "${words[@]}" "objective.cache=$out/$model-cache" # the run that fills the cache
  train "$model-cached" "${words[@]}" "objective.cache=$out/$model-cache"
  train "$model-live-again" "${words[@]}" # what the machine did meanwhile
done
for run in "$out"/*-*/result.json; do
  python - "$run" <<'PY'
import json, sys
from pathlib import Path

file = Path(sys.argv[1])
found = json.loads(file.read_text())["metrics"]
names = ("tokens_per_second", "perplexity/start", "perplexity/student", "kl/student")
print(file.parent.name, *(f"{name} {found[name]:.5g}" for name in names))
PY
done
du -sb "$out"/*-cache
