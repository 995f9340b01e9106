#!/usr/bin/env bash
# Quickstart: GRPO with Progressive Thought Encoding through stock verl, on a CPU (2 cores, 8 GB).
#
#   bash examples/quickstart/run.sh                 about 6 minutes; fails unless the reward rises
#   bash examples/quickstart/run.sh --short         about 2 minutes; 3 steps, no demand on the reward
#   bash examples/quickstart/run.sh trainer.logger='[console,file,tensorboard]'     further arguments go to verl
#
# Makes a tiny model that knows a generated task in part, trains it, and reports. See README.md beside this file.
set -xeuo pipefail

SHORT=${QUICKSTART_SHORT:-0}
if [[ ${1:-} == --short ]]; then
    SHORT=1
    shift
fi
if [[ $SHORT == 1 ]]; then
    STEPS=${QUICKSTART_STEPS:-3}
    PRETRAIN_STEPS=${PRETRAIN_STEPS:-60}
    MIN_RISE=${MIN_RISE:-}
else
    STEPS=${QUICKSTART_STEPS:-20}
    PRETRAIN_STEPS=${PRETRAIN_STEPS:-600}
    MIN_RISE=${MIN_RISE:-0.15}
fi

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
HERE=$REPO/examples/quickstart
OUT=${OUT:-$REPO/outputs/quickstart}
PYTHON=${PYTHON:-python}
SEED=${SEED:-0}
WINDOW=${WINDOW:-16}
EVICT_FRACTION=${EVICT_FRACTION:-0.25}
BLOCK_SIZE=${BLOCK_SIZE:-8}
LR=${LR:-1e-3}
STARTED=$(date +%s)

mkdir -p "$OUT"
rm -f "$OUT"/metrics.jsonl "$OUT"/summary.json "$OUT"/curves.png
export VERL_PLATFORM=cpu VERL_FILE_LOGGER_PATH=$OUT/metrics.jsonl HF_HUB_OFFLINE=1
export TQ_NUM_THREADS=${TQ_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false  # fewer threads, and fewer warnings about them

CACHE=(
    --window "$WINDOW"
    --evict-fraction "$EVICT_FRACTION"
    --block-size "$BLOCK_SIZE"
)
"$PYTHON" "$HERE"/make_model.py --out "$OUT" --seed "$SEED" --max-steps "$PRETRAIN_STEPS" "${CACHE[@]}"

DATA=(
    data.train_files="$OUT"/train.parquet
    data.val_files="$OUT"/val.parquet
    data.train_batch_size=16
    data.max_prompt_length=72
    data.max_response_length=96
    data.seed="$SEED"
)
REWARD=(
    reward.custom_reward_function.path="$HERE"/reward.py
    reward.custom_reward_function.name=compute_score
)
MODEL=(
    actor_rollout_ref.model.path="$OUT"/model
    actor_rollout_ref.model.pte.rank=16
    actor_rollout_ref.model.pte.alpha=32
    actor_rollout_ref.model.pte.num_global_tokens=8
    actor_rollout_ref.model.pte.window="$WINDOW"
    actor_rollout_ref.model.pte.evict_fraction="$EVICT_FRACTION"
    actor_rollout_ref.model.pte.block_size="$BLOCK_SIZE"
    actor_rollout_ref.model.pte.chunk_tokens=128
)
ACTOR=(
    actor_rollout_ref.actor.optim.lr="$LR"
    actor_rollout_ref.actor.ppo_mini_batch_size=4
)
ROLLOUT=(
    actor_rollout_ref.rollout.n=8
)
TRAINER=(
    trainer.project_name=verl_pte
    trainer.experiment_name=quickstart
    trainer.logger='[console,file]'
    trainer.total_training_steps="$STEPS"
    trainer.default_local_dir="$OUT"/checkpoints
    hydra.run.dir="$OUT"/hydra
)

"$PYTHON" -m verl.trainer.main_ppo --config-dir "$REPO"/recipes --config-name pte_tiny_cpu \
    "${DATA[@]}" "${REWARD[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"

"$PYTHON" "$HERE"/report.py --out "$OUT" --started "$STARTED" "${CACHE[@]}" ${MIN_RISE:+--min-rise "$MIN_RISE"}
