#!/usr/bin/env bash
# GRPO with Progressive Thought Encoding, from data to checkpoints. run_<model>.sh call it; everything can be set from outside:
#
#   MODEL=qwen2.5_3b bash examples/run_pte.sh
#   MODEL=qwen2.5_7b ROLLOUT=vllm WARM_START=1 bash examples/run_pte.sh
#   RECIPE=lora_window MODEL=qwen2.5_3b bash examples/run_pte.sh           a baseline (recipes/README.md)
#   MODEL=qwen2.5_3b bash examples/run_pte.sh trainer.logger='[console,wandb]'     further arguments go to verl
#
# The values are the paper's where it states one. Data come from the hub unless TRAIN_FILE and VAL_FILE exist. WARM_START=1 first
# distils the full-cache base into an adapter (docs/warm_start.md). Started again, it goes on from the last checkpoint.
set -xeuo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
RECIPE=${RECIPE:-pte_grpo}
MODEL=${MODEL:-any}                 # a file of recipes/pte/model
MODEL_PATH=${MODEL_PATH:-}          # default: the one that file names
ROLLOUT=${ROLLOUT:-native}          # or vllm
NUM_GPUS=${NUM_GPUS:-8}
FAMILY=${FAMILY:-qwen2.5}           # of the prompts: verl-pte prepare-data --help
DATA_DIR=${DATA_DIR:-$REPO/data/$FAMILY}
TRAIN_FILE=${TRAIN_FILE:-$DATA_DIR/dapo-math-17k.parquet}
VAL_FILE=${VAL_FILE:-$DATA_DIR/math-500.parquet}
OUT=${OUT:-$REPO/outputs/$RECIPE-$MODEL}
TOTAL_STEPS=${TOTAL_STEPS:-null}    # null: once through the data
WARM_START=${WARM_START:-0}
WARM_START_STEPS=${WARM_START_STEPS:-200}
WARM_START_ARGS=${WARM_START_ARGS:-}  # more options of verl-pte warm-start: where model.pte differs from its defaults, say it here too
WINDOW=${WINDOW:-1024}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-1024}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-3072}
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-64}  # times N: 512 responses a step
N=${N:-8}
LR=${LR:-1e-5}

if [[ $RECIPE == lora_full && $WARM_START == 1 ]]; then
    echo "WARM_START=1: lora_full has a full cache, which has nothing to be taught" >&2
    exit 2
fi
mkdir -p "$OUT"

if [[ ! -f $TRAIN_FILE || ! -f $VAL_FILE ]]; then
    "$PYTHON" -m verl_pte.cli prepare-data dapo-math-17k math-500 --family "$FAMILY" --output "$DATA_DIR"
fi

DATA=(
    data.train_files="$TRAIN_FILE"
    data.val_files="$VAL_FILE"
    data.train_batch_size="$TRAIN_BATCH_SIZE"
    data.max_prompt_length="$MAX_PROMPT_LENGTH"
    data.max_response_length="$MAX_RESPONSE_LENGTH"
)
MODEL_ARGS=(
    pte/model="$MODEL"
)
[[ -z $MODEL_PATH ]] || MODEL_ARGS+=(actor_rollout_ref.model.path="$MODEL_PATH")
[[ $RECIPE == lora_full ]] || MODEL_ARGS+=(actor_rollout_ref.model.pte.window="$WINDOW")
ACTOR=(
    actor_rollout_ref.actor.optim.lr="$LR"
    actor_rollout_ref.actor.ppo_mini_batch_size="$TRAIN_BATCH_SIZE"
)
ROLLOUT_ARGS=(
    pte/rollout="$ROLLOUT"
    actor_rollout_ref.rollout.n="$N"
)
TRAINER=(
    trainer.n_gpus_per_node="$NUM_GPUS"
    trainer.total_training_steps="$TOTAL_STEPS"
    trainer.default_local_dir="$OUT/checkpoints"
    hydra.run.dir="$OUT/hydra"
)

if [[ $WARM_START == 1 ]]; then
    read -ra MORE <<< "$WARM_START_ARGS"
    WARM=(
        --model "${MODEL_PATH:?WARM_START=1 needs MODEL_PATH}"
        --prompts "$TRAIN_FILE"
        --output "$OUT/warm"
        --steps "$WARM_START_STEPS"
        --max-prompt-length "$MAX_PROMPT_LENGTH"
        --max-response-length "$MAX_RESPONSE_LENGTH"
        --pte window="$WINDOW"
    )
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NUM_GPUS" -m verl_pte.cli warm-start "${WARM[@]}" "${MORE[@]}"
    MODEL_ARGS+=(actor_rollout_ref.model.lora_adapter_path="$OUT/warm/adapter")
fi

"$PYTHON" -m verl.trainer.main_ppo --config-dir "$REPO/recipes" --config-name "$RECIPE" \
    "${DATA[@]}" "${MODEL_ARGS[@]}" "${ACTOR[@]}" "${ROLLOUT_ARGS[@]}" "${TRAINER[@]}" "$@"
