#!/usr/bin/env bash
# GRPO with Progressive Thought Encoding: Qwen2.5-3B-Instruct on 8 GPUs.
#
#   bash examples/run_qwen2.5_3b.sh
#   ROLLOUT=vllm WARM_START=1 bash examples/run_qwen2.5_3b.sh trainer.logger='[console,wandb]'
#
# run_pte.sh has the settings, all of which can be set from outside; further arguments go to verl.
set -xeuo pipefail

export MODEL=${MODEL:-qwen2.5_3b}
export MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-3B-Instruct}
export FAMILY=${FAMILY:-qwen2.5}
export NUM_GPUS=${NUM_GPUS:-8}

exec bash "$(dirname "${BASH_SOURCE[0]}")"/run_pte.sh "$@"
