#!/usr/bin/env bash
# SmolLM2-135M dense, at two thirds of its parameters by the fastest plan, and packed: ONNX folders of 32, 8 and 4 bits.
# Usage: KNCOMPRESS_DATA=<folder with wikitext2/ and text/> experiments/deployment/run.sh [folder for the runs]
set -euo pipefail
here="$(dirname "$0")"
out="${1:-runs/deployment}"
finished() { grep -qs '"status": "finished"' "$1/result.json" || { rm -rf "$1" && false; }; }
export OMP_NUM_THREADS=1

compress() { # name, plan
  finished "$out/$1" || python -m kncompress compress model=smollm2 "factors=$2" start=calibrated fit.sides=both \
    "data.source=$KNCOMPRESS_DATA/wikitext2/wiki.train.tokens" calibration.tokens=12288 calibration.context=512 \
    "calibration.moments=$out/moments" "run_dir=$out/$1"
}
compress speed "$here/../planner/planner_speed.yaml"
compress packed "$here/../two_sided/gradients.yaml"
python "$here/study.py" make "$out/onnx" dense=smollm2 "speed=$out/speed/model" "packed=$out/packed/model"
python "$here/study.py" score "$out/onnx" "$KNCOMPRESS_DATA/wikitext2/wiki.test.raw" "$KNCOMPRESS_DATA/text/digitalgov_cc0.txt"
python "$here/study.py" time "$out/onnx" 4
python "$here/report.py" "$out/onnx"

# GPT-2 small's sizes with random weights, dense and with the shapes of kngpt2, as pairs in turns.
measure() { # name, overrides
  finished "$out/bench-$1" || python -m kncompress bench "parts=[generate]" precision=fp32 accelerator=cpu threads=1 repeats=5 \
    "run_dir=$out/bench-$1" "${@:2}"
}
measure gpt2-genai "runtimes=[onnxruntime-genai]" "bits=[32,8,4]"
measure gpt2-rest "runtimes=[transformers,onnxruntime]"
measure gpt2-dynamic "runtimes=[onnxruntime-genai]" "bits=[dynamic]"
python "$here/runtimes.py" "$out"
python "$here/gauge.py" "$out/packed/model" "$KNCOMPRESS_DATA/wikitext2/wiki.test.raw" "$KNCOMPRESS_DATA/text/digitalgov_cc0.txt"
