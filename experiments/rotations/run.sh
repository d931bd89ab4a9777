#!/usr/bin/env bash
# Kronecker sums in a turned residual stream against packed low rank, no training: the mini teacher, and every sixth
# layer of SmolLM2-135M (leave out the 6 for all layers and perplexity).
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/ and text/> experiments/rotations/run.sh [folder for moments]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/rotations}"
python "$here/study.py" mini "$here/results.csv" "$out/mini"
python "$here/study.py" smollm2 "$here/results.csv" "$out/smollm2" 6
