#!/usr/bin/env bash
# The guide's automated workflow in a workspace laid out as its /workspace: validate the adapter, merge it, verify
# the merged weights, validate the merged model, package everything for download. Every path can be set:
#
#   WORKSPACE    /workspace
#   LORA_PATH    $WORKSPACE/models/phase1_maml_lora_v2/best
#   BASE_MODEL   as adapter_config.json says: a folder, or org/name on the Hugging Face hub
#   TEST_FILE    $WORKSPACE/data/benchmarks/validation_test.jsonl
#   TRAIN_FILE   $WORKSPACE/data/phase1/answers/training_data_clean.jsonl, if it is there: checked for overlap
#   MERGED_PATH  $WORKSPACE/models/phase1_maml_lora_v2/merged
#   RESULTS_DIR  $WORKSPACE/results/phase1_validation
#   PACKAGE_DIR  $WORKSPACE/download_package
#   RUN_DIR      $WORKSPACE/results/phase1_run: the run itself, which a killed workflow goes on from
#   PRECISION    bfloat16
#   ROUNDING, DEVICE, BATCH_SIZE, CONFIG (a run.toml): as `lorasmith run` has them
#   PYTHON       $WORKSPACE/venv's python if it is there, else python3
#
# Exits with 0 when all gates pass, 1 when one fails or the merged weights are different, 2 for wrong input,
# 3 when the machine cannot do it. The package is there after 0 and 1.
set -euo pipefail

WORKSPACE="${WORKSPACE:-/workspace}"
MODELS="$WORKSPACE/models/phase1_maml_lora_v2"
LORA_PATH="${LORA_PATH:-$MODELS/best}"
TEST_FILE="${TEST_FILE:-$WORKSPACE/data/benchmarks/validation_test.jsonl}"
DEFAULT_TRAIN_FILE="$WORKSPACE/data/phase1/answers/training_data_clean.jsonl"
if [[ -z "${TRAIN_FILE:-}" && -f "$DEFAULT_TRAIN_FILE" ]]; then
    TRAIN_FILE="$DEFAULT_TRAIN_FILE"
fi
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$WORKSPACE/venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
if [[ ! -f "$TEST_FILE" ]]; then
    echo "error: there is no test set at $TEST_FILE" >&2
    echo "  to do:    python scripts/convert_benchmarks_to_test.py --samples-per-benchmark 100" >&2
    exit 2
fi

arguments=(
    --lora_path "$LORA_PATH"
    --test_file "$TEST_FILE"
    --merged_path "${MERGED_PATH:-$MODELS/merged}"
    --results_dir "${RESULTS_DIR:-$WORKSPACE/results/phase1_validation}"
    --package_dir "${PACKAGE_DIR:-$WORKSPACE/download_package}"
    --run_dir "${RUN_DIR:-$WORKSPACE/results/phase1_run}"
    --precision "${PRECISION:-bfloat16}"
)
optional() {
    if [[ -n "$2" ]]; then
        arguments+=("$1" "$2")
    fi
}
optional --base_model "${BASE_MODEL:-}"
optional --train_file "${TRAIN_FILE:-}"
optional --rounding "${ROUNDING:-}"
optional --device "${DEVICE:-}"
optional --batch_size "${BATCH_SIZE:-}"
optional --config "${CONFIG:-}"

exec "$PYTHON" -m lorasmith.cli.workflow "${arguments[@]}"
