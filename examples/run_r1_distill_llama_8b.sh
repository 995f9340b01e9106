#!/usr/bin/env bash
# GRPO with Progressive Thought Encoding: DeepSeek-R1-Distill-Llama-8B on 8 GPUs.
#
#   bash examples/run_r1_distill_llama_8b.sh
#   ROLLOUT=vllm WARM_START=1 bash examples/run_r1_distill_llama_8b.sh trainer.logger='[console,wandb]'
#
# run_pte.sh has the settings, all of which can be set from outside; further arguments go to verl.
set -xeuo pipefail

export MODEL=${MODEL:-r1_distill_llama_8b}
export MODEL_PATH=${MODEL_PATH:-deepseek-ai/DeepSeek-R1-Distill-Llama-8B}
export FAMILY=${FAMILY:-r1-distill}
export NUM_GPUS=${NUM_GPUS:-8}

exec bash "$(dirname "${BASH_SOURCE[0]}")"/run_pte.sh "$@"
