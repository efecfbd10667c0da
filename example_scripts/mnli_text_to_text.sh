#!/usr/bin/env bash
# MNLI as text-to-text, the whole way: fine-tune GPT-J, validate, and ask the saved checkpoint through a Hugging Face pipeline.
#
#   python convert_from_hf_gptj.py --model-name EleutherAI/gpt-j-6b --save-dir pretrained_models
#   OUT=model_checkpoints/mnli example_scripts/mnli_text_to_text.sh
#
# A row becomes "mnli hypothesis: H premise: P target: LABEL" and the end of text. Rows are joined in groups of 1000 and cut into blocks of
# SEQ_LENGTH + 1 tokens (--packing concat: 392,702 rows make 17,762 sequences of 1024), so that no token is padding; the loss is on all
# of them. The settings are those published for GPT-J: global batch 128, AdamW .9 .999 1e-6 without decay, rate 5e-6 falling to 1e-7,
# 0.6 % of the steps to warm up, no dropout. The mark to compare with: 8107 of 9832 mismatched validation rows right, 82.5 %.
# Validation generates five tokens for each row and compares the answer exactly; what is no label counts as badly formed, and as wrong.
#
# STAGES x REPLICAS processes on this host, one GPU each. In bf16 with exact masters GPT-J takes 97 GB: 24 GB a stage at four stages (and
# --optimizer 8bit-adam, as a flag behind the script's name, 61 GB in all). Run it again to resume: what is done is not done twice. Flags
# behind the script's name go to dist_clm_train.py.
set -euo pipefail

: "${MODEL:=pretrained_models/EleutherAI_gpt-j-6b}" # folder written by a converter, a Hugging Face folder, or a hub name
: "${TRAIN_DATA:=hf:glue/mnli@train}" # rows to train on: hf:..., or a file of premise, hypothesis and label
: "${EVAL_DATA:=hf:glue/mnli@validation_mismatched}" # rows to validate on
: "${OUT:=model_checkpoints/mnli}"    # checkpoints, train_log.jsonl, validation.json and answers.jsonl go here
: "${STAGES:=4}"                      # stages that the layers are cut into
: "${REPLICAS:=1}"                    # copies of the pipeline
: "${BATCH:=$((128 / REPLICAS))}"     # sequences per replica and step; default: 128 over all replicas
: "${MICRO_BATCH:=1}"                 # sequences that travel through the pipeline together; divides BATCH
: "${SEQ_LENGTH:=1024}"               # tokens per sequence
: "${STEPS:=400}"                     # steps; 300 are about two epochs
: "${LR:=5e-6}"                       # highest learning rate
: "${PRECISION=--bf16 true}"         # or --fp16 true --loss-scale 4096, as it was published
: "${CHECKPOINT_STEPS:=100}"          # steps between checkpoints
: "${MAX_EVAL_SAMPLES:=}"             # validate on that many rows; default: all of them
: "${EVAL_BATCH:=32}"                 # prompts that are answered together
: "${NUM_SHOWN:=5}"                   # validation rows that the Hugging Face pipeline is asked at the end; 0: none, and nothing is loaded

# shellcheck source=example_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$@"
needs_number STAGES REPLICAS BATCH STEPS
read -r -a precision <<<"$PRECISION"

echo "--- training: $OUT"
run_ranks "$((STAGES * REPLICAS))" "$OUT/logs" dist_clm_train.py --pipeline-group-size "$STAGES" --data-group-size "$REPLICAS" \
    --model-name "$MODEL" --task-name "mnli=$TRAIN_DATA" --packing concat --loss-on all --seq-length "$SEQ_LENGTH" \
    --batch-size "$BATCH" --micro-batch-size "$MICRO_BATCH" --total-steps "$STEPS" --lr "$LR" --min-lr 1e-7 --warmup-proportion 0.005995 \
    --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-6 --weight-decay 0 --recompute layer \
    --checkpoint-path "$OUT" --checkpoint-steps "$CHECKPOINT_STEPS" ${precision[@]+"${precision[@]}"} "$@"
checkpoint=$(newest_checkpoint "$OUT")

echo "--- validation: $checkpoint"
few=()
if [[ -n $MAX_EVAL_SAMPLES ]]; then few=(--max-eval-samples "$MAX_EVAL_SAMPLES"); fi
run_ranks "$STAGES" "$OUT/logs/validation" dist_clm_eval.py --pipeline-group-size "$STAGES" --model-name "$checkpoint" \
    --evaluation-data "mnli=$EVAL_DATA" --metric accuracy --max-new-tokens 5 --batch-size "$EVAL_BATCH" \
    ${few[@]+"${few[@]}"} --json "$OUT/validation.json" --output "$OUT/answers.jsonl" ${precision[@]+"${precision[@]}"}
"$PYTHON" "$repo/example_scripts/results_table.py" "$OUT/validation.json"

((NUM_SHOWN > 0)) || exit 0
echo "--- the same checkpoint in transformers: pipeline('text-generation', '$checkpoint')"
"$PYTHON" - "$checkpoint" "$OUT/answers.jsonl" "$NUM_SHOWN" <<'PYTHON'
import itertools
import json
import sys

import torch
from transformers import pipeline

checkpoint, answers, num_shown = sys.argv[1], sys.argv[2], int(sys.argv[3])
generate = pipeline("text-generation", checkpoint, device=0 if torch.cuda.is_available() else "cpu")
with open(answers, encoding="utf-8") as file:
    for row in map(json.loads, itertools.islice(file, num_shown)):
        made = generate(row["prompt"], max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
        answers_of_both = f"pipeline: {made.strip()!r}   dist_clm_eval.py: {row['generated'].strip()!r}"
        print(f"{row['prompt']}\n    {answers_of_both}   expected: {row['expected']!r}")
PYTHON
