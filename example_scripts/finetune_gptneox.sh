#!/usr/bin/env bash
# Fine-tune GPT-NeoX-20B over 8 stages on 8 GPUs: finetune_gptj.sh with the settings of a model three times as large.
#
#   python convert_from_hf_gptneox.py --model-name EleutherAI/gpt-neox-20b --save-dir pretrained_models
#   TASKS=mine.jsonl OUT=model_checkpoints/neox example_scripts/finetune_gptneox.sh
#
# 44 layers make stages of 6 or 5. A parameter takes 10 bytes (bf16, 16 more bits of an exact master, fp32 gradient, 8-bit moments): 206 GB
# for all 20.6 billion, 26 GB a GPU, activations besides; with FLAGS="--bf16 true" it takes 16, and a GPU 41 GB. What every stage will
# take, without loading anything: python -m training.memory with the same flags. Cards of 24 GB train adapters beside a base in int8:
#   FLAGS="--bf16 true --recompute layer --train lora --base-quantization int8" LR=1e-4 ... finetune_gptneox.sh
#
# Pythia and RedPajama-INCITE are of the same family: MODEL=pretrained_models/EleutherAI_pythia-6.9b PIPELINE=4 ... finetune_gptneox.sh
#
# All settings of finetune_gptj.sh hold here (finetune_gptj.sh --help), as do its logs, its resume and its way to use several hosts; only
# the defaults below are others. Further flags of dist_clm_train.py may follow on the command line.
set -euo pipefail

: "${MODEL:=pretrained_models/EleutherAI_gpt-neox-20b}" # folder written by convert_from_hf_gptneox.py, a Hugging Face folder, or a hub name
: "${OUT:=model_checkpoints/gptneox}" # checkpoints, train_log.jsonl and logs/ go here; one job per folder
: "${PIPELINE:=8}"                    # stages that the layers are cut into
: "${REPLICAS:=1}"                    # copies of the pipeline
: "${BATCH:=32}"                      # sequences per replica and accumulation step; four per stage keep 8 stages busy
: "${MICRO_BATCH:=1}"                 # sequences that travel through the pipeline together; divides BATCH
: "${FLAGS=--bf16 true --optimizer 8bit-adam --recompute layer}" # precision and memory: flags of dist_clm_train.py

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -nE '2,/^set -/{/^#/s/^# ?//p}; s/^: "\$\{([A-Z_]+):?=(.*)\}"/  \1=\2/p' "$0"
    exit 0
fi
export MODEL OUT PIPELINE REPLICAS BATCH MICRO_BATCH
read -r -a flags <<<"$FLAGS"
exec "$(dirname "${BASH_SOURCE[0]}")/finetune_gptj.sh" ${flags[@]+"${flags[@]}"} "$@"
