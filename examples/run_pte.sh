#!/usr/bin/env bash
# GRPO with Progressive Thought Encoding, from data to checkpoints. run_<model>.sh call it; everything can be set from outside:
#
#   MODEL=qwen2.5_3b bash examples/run_pte.sh
#   MODEL=qwen2.5_7b ROLLOUT=vllm WARM_START=1 bash examples/run_pte.sh
#   MODEL=qwen2.5_7b ENGINE=megatron bash examples/run_pte.sh
#   RECIPE=lora_window MODEL=qwen2.5_3b bash examples/run_pte.sh           a baseline (recipes/README.md)
#   MODEL=qwen2.5_3b bash examples/run_pte.sh trainer.logger='[console,wandb]'     further arguments go to verl
#
# What is not set is the recipe's. Data come from the hub where they are missing. WARM_START=1 first distils the full-cache base
# into an adapter (docs/warm_start.md). Started again with the same OUT, it goes on from the last checkpoint, and refuses if what
# the checkpoint was made with has changed: recipe, model, data, lengths, window, sizes, learning rate. Arguments for verl are not compared.
set -xeuo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
RECIPE=${RECIPE:-pte_grpo}
MODEL=${MODEL:-any}                 # a file of recipes/pte/model
GROUP=$REPO/recipes/pte/model/$MODEL.yaml
MODEL_PATH=${MODEL_PATH:-$(sed -n 's/^    path: *//p' "$GROUP")}  # actor_rollout_ref.model.path
ROLLOUT=${ROLLOUT:-native}          # or vllm
ENGINE=${ENGINE:-fsdp2}             # of training; or megatron
NUM_GPUS=${NUM_GPUS:-8}
FAMILY=${FAMILY:-qwen2.5}           # of the prompts: verl-pte prepare-data --help
DATA_DIR=${DATA_DIR:-$REPO/data/$FAMILY}
TRAIN_FILE=${TRAIN_FILE:-}          # default: DAPO-Math-17K in DATA_DIR
VAL_FILE=${VAL_FILE:-}              # default: MATH-500 in DATA_DIR
OUT=${OUT:-$REPO/outputs/$RECIPE-$MODEL}
TOTAL_STEPS=${TOTAL_STEPS:-null}    # null: once through the data
WARM_START=${WARM_START:-0}
WARM_START_STEPS=${WARM_START_STEPS:-200}
WARM_START_ARGS=${WARM_START_ARGS:-}  # more options of verl-pte warm-start: where model.pte differs from its defaults, say it here too
WINDOW=${WINDOW:-1024}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-1024}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-3072}
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-}  # prompts a step; default: the recipe's
MINI_BATCH_SIZE=${MINI_BATCH_SIZE:-}    # prompts an update; default: the recipe's share of a step
N=${N:-}                            # responses a prompt
LR=${LR:-}

fail() {
    echo "error: $1" >&2
    exit 2
}

[[ -n $MODEL_PATH ]] || fail "MODEL_PATH is not set, and MODEL=$MODEL names none"
case $ENGINE in
    fsdp2) ENGINE_ARGS=() ;;
    megatron) ENGINE_ARGS=(model_engine=megatron pte/engine=megatron) ;;
    *) fail "ENGINE=$ENGINE: must be fsdp2 or megatron" ;;
esac
case $RECIPE in
    lora_full) [[ $WARM_START == 0 ]] || fail "WARM_START=$WARM_START: lora_full has a full cache, which has nothing to be taught" ;;
    lora_window) WARM_START_ARGS="--pte freeze_state=true $WARM_START_ARGS" ;;
    global_only) WARM_START_ARGS="--pte update_state=false $WARM_START_ARGS" ;;
esac
if [[ -n $TRAIN_BATCH_SIZE && -z $MINI_BATCH_SIZE ]]; then
    case $RECIPE in
        pte_dapo | pte_ppo) UPDATES=4 ;;
        *) UPDATES=1 ;;
    esac
    MINI_BATCH_SIZE=$((TRAIN_BATCH_SIZE / UPDATES))
    [[ $((MINI_BATCH_SIZE * UPDATES)) == "$TRAIN_BATCH_SIZE" ]] ||
        fail "TRAIN_BATCH_SIZE=$TRAIN_BATCH_SIZE: must be a multiple of $UPDATES, the updates a step of $RECIPE, or set MINI_BATCH_SIZE"
fi
for file in "$TRAIN_FILE" "$VAL_FILE"; do
    [[ -z $file || -f $file ]] || fail "$file: no such file (TRAIN_FILE, VAL_FILE)"
done

# What a checkpoint in OUT was made with. verl would go on from it under any settings.
mkdir -p "$OUT"
SETTINGS="RECIPE=$RECIPE MODEL_PATH=$MODEL_PATH FAMILY=$FAMILY TRAIN_FILE=${TRAIN_FILE:-$DATA_DIR/dapo-math-17k.parquet} ENGINE=$ENGINE NUM_GPUS=$NUM_GPUS WARM_START=$WARM_START WINDOW=$WINDOW
MAX_PROMPT_LENGTH=$MAX_PROMPT_LENGTH MAX_RESPONSE_LENGTH=$MAX_RESPONSE_LENGTH TRAIN_BATCH_SIZE=$TRAIN_BATCH_SIZE MINI_BATCH_SIZE=$MINI_BATCH_SIZE N=$N LR=$LR"
begun() { [[ -e $OUT/warm || -e $OUT/checkpoints/latest_checkpointed_iteration.txt ]]; }
if begun && [[ -f $OUT/settings.txt && $(< "$OUT/settings.txt") != "$SETTINGS" ]]; then
    fail "OUT=$OUT holds a run with other settings ($(tr '\n' ' ' < "$OUT/settings.txt")): set another OUT, or those"
fi
echo "$SETTINGS" > "$OUT/settings.txt"

prepare() { # name of the set
    [[ -f $DATA_DIR/$1.parquet ]] || "$PYTHON" -m verl_pte.cli prepare-data "$1" --family "$FAMILY" --output "$DATA_DIR"
}
if [[ -z $TRAIN_FILE ]]; then
    prepare dapo-math-17k
    TRAIN_FILE=$DATA_DIR/dapo-math-17k.parquet
fi
if [[ -z $VAL_FILE ]]; then
    prepare math-500
    VAL_FILE=$DATA_DIR/math-500.parquet
fi

DATA=(
    data.train_files="$TRAIN_FILE"
    data.val_files="$VAL_FILE"
    data.max_prompt_length="$MAX_PROMPT_LENGTH"
    data.max_response_length="$MAX_RESPONSE_LENGTH"
    ${TRAIN_BATCH_SIZE:+data.train_batch_size="$TRAIN_BATCH_SIZE"}
)
MODEL_ARGS=(
    pte/model="$MODEL"
    actor_rollout_ref.model.path="$MODEL_PATH"
)
[[ $RECIPE == lora_full ]] || MODEL_ARGS+=(actor_rollout_ref.model.pte.window="$WINDOW")
ACTOR=(
    ${MINI_BATCH_SIZE:+actor_rollout_ref.actor.ppo_mini_batch_size="$MINI_BATCH_SIZE"}
    ${LR:+actor_rollout_ref.actor.optim.lr="$LR"}
)
ROLLOUT_ARGS=(
    pte/rollout="$ROLLOUT"
    ${N:+actor_rollout_ref.rollout.n="$N"}
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
        --model "$MODEL_PATH"
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
    "${DATA[@]}" "${MODEL_ARGS[@]}" "${ENGINE_ARGS[@]}" "${ACTOR[@]}" "${ROLLOUT_ARGS[@]}" "${TRAINER[@]}" "$@"
