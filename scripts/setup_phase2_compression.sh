#!/usr/bin/env bash
# The guide's phase 2 by its own name: compress the merged model to INT4. First the sizes that are possible, then
# the work. The guide plans 14 GB -> 540 MB; where no method reaches that, this says so with figures and goes on to
# the 4-bit model at its real size. Every path and choice can be set:
#
#   WORKSPACE          /workspace
#   MODEL_PATH         $WORKSPACE/models/phase1_maml_lora_v2/merged
#   OUTPUT_PATH        $WORKSPACE/models/phase2_compressed
#   TARGET_SIZE        540MB, as in the guide
#   FORMAT             compressed-tensors, or gguf:q4_0, gguf:q4_k_m, ...
#   METHOD             rtn, or calibrated (on the rows of TRAIN_FILE)
#   TRAIN_FILE         $WORKSPACE/data/phase1/answers/training_data_clean.jsonl
#   TEST_FILE          $WORKSPACE/data/benchmarks/validation_test.jsonl, if it is there: the quality is measured on it
#   ONLY_IF_REACHABLE  1: stop with 1 where the target cannot be reached
#   PYTHON             $WORKSPACE/venv's python if it is there, else python3
#
# Exits with 0 when done, 1 when the compressed model loses more than the gates allow (or, with ONLY_IF_REACHABLE,
# when the target cannot be reached), 2 for wrong input, 3 when the machine cannot do it.
set -euo pipefail

WORKSPACE="${WORKSPACE:-/workspace}"
MODEL_PATH="${MODEL_PATH:-$WORKSPACE/models/phase1_maml_lora_v2/merged}"
OUTPUT_PATH="${OUTPUT_PATH:-$WORKSPACE/models/phase2_compressed}"
TARGET_SIZE="${TARGET_SIZE:-540MB}"
FORMAT="${FORMAT:-compressed-tensors}"
METHOD="${METHOD:-rtn}"
TRAIN_FILE="${TRAIN_FILE:-$WORKSPACE/data/phase1/answers/training_data_clean.jsonl}"
TEST_FILE="${TEST_FILE:-$WORKSPACE/data/benchmarks/validation_test.jsonl}"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$WORKSPACE/venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
lorasmith() { "$PYTHON" -m lorasmith.cli.main "$@"; }

echo "Step 1/2: what sizes are possible"
planned=0
lorasmith compress --model "$MODEL_PATH" --plan --target-size "$TARGET_SIZE" || planned=$?
if ((planned > 1)); then
    exit "$planned"
fi
if ((planned == 1)); then
    echo
    echo "$TARGET_SIZE is not a size of this model. INT4 is four bits for each weight and a scale for each group of"
    echo "weights, a quarter of 16 bits: 14 GB become 4 to 5.5 GB. 540 MB is what a model of half a billion to a"
    echo "billion parameters takes, such as the draft model of phase 1E (lorasmith draft train)."
    if [[ -n "${ONLY_IF_REACHABLE:-}" ]]; then
        exit 1
    fi
fi

echo
echo "Step 2/2: compress to $FORMAT ($METHOD)"
arguments=(--model "$MODEL_PATH" --output "$OUTPUT_PATH" --format "$FORMAT" --method "$METHOD")
if [[ "$METHOD" == calibrated ]]; then
    arguments+=(--calibration "$TRAIN_FILE")
fi
if [[ -f "$TEST_FILE" ]]; then
    arguments+=(--test-set "$TEST_FILE" --report "$OUTPUT_PATH.html")
else
    echo "note: there is no test set at $TEST_FILE, so the quality is not measured"
fi
lorasmith compress "${arguments[@]}"
