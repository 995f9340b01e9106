#!/usr/bin/env bash
# GRPO with Progressive Thought Encoding: Qwen2.5-3B-Instruct on one GPU of 80 GB.
#
#   bash examples/run_qwen2.5_3b_1gpu.sh
#   ROLLOUT=vllm WARM_START=1 bash examples/run_qwen2.5_3b_1gpu.sh trainer.logger='[console,wandb]'
#
# run_pte.sh has the settings, all of which can be set from outside; further arguments go to verl.
set -xeuo pipefail

export MODEL=${MODEL:-qwen2.5_3b}
export MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-3B-Instruct}
export FAMILY=${FAMILY:-qwen2.5}
export NUM_GPUS=${NUM_GPUS:-1}

# A smaller step: a global batch of 512 would take one GPU hours.
export TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-16}
export OUT=${OUT:-$(dirname "${BASH_SOURCE[0]}")/../outputs/${RECIPE:-pte_grpo}-$MODEL-1gpu}

exec bash "$(dirname "${BASH_SOURCE[0]}")"/run_pte.sh "$@"
