#!/usr/bin/env bash
# MNLI with LoRA on CPUs alone: bf16, adapters on the attention's four linears, 5000 rows to train on, 500 to validate on.
#
#   OUT=model_checkpoints/mnli_lora CORES="0-27 28-55" REPLICAS=2 example_scripts/mnli_lora_cpu.sh
#
# GPT-J in bf16 lies in memory once per replica (12 GB), adapters of rank 18 on top (16.5 million parameters); a checkpoint is a peft folder
# of 66 MB and what a resume needs. bf16 wants units for it: lscpu lists amx_bf16 (Xeons from the fourth generation on) or avx512_bf16.
# Without either try PRECISION="", which is fp32 and takes 24 GB.
#
# Cores. A replica belongs to one socket: memory of the other one is half as fast. `lscpu` lists the cores of each NUMA node; name them
# in CORES, one list per rank, physical cores only (hyper-threads share the units that multiply), and let NUM_THREADS be their number. Two
# sockets are two replicas: CORES="0-27 28-55" REPLICAS=2 NUM_THREADS=28. For one rank and one socket, with its memory held there as well:
#   numactl --cpunodebind=0 --membind=0 example_scripts/mnli_lora_cpu.sh
# (Linux puts memory where it is first touched, so pinning alone mostly does.) Threads stay on their cores with
#   export OMP_PROC_BIND=close OMP_PLACES=cores        (libgomp); KMP_AFFINITY=granularity=fine,compact,1,0 KMP_BLOCKTIME=1 (libiomp5)
#
# Allocator. glibc gives large blocks back to the system after every step and takes page faults for them in the next one. Either of
#   ALLOCATOR=/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4       (package libtcmalloc-minimal4)
#   ALLOCATOR=/usr/lib/x86_64-linux-gnu/libjemalloc.so.2               (package libjemalloc2)
# keeps them; jemalloc with this in the environment:
#   MALLOC_CONF="oversize_threshold:1,background_thread:true,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"
# Without either: MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_THRESHOLD_=2147483647. Transparent huge pages help too:
#   echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, and THP_MEM_ALLOC_ENABLE=1 for torch.
#
# Run it again to resume. Flags behind the script's name go to dist_clm_train.py.
set -euo pipefail

: "${MODEL:=pretrained_models/EleutherAI_gpt-j-6b}" # folder written by a converter, a Hugging Face folder, or a hub name
: "${TRAIN_DATA:=hf:glue/mnli@train}" # rows to train on: hf:..., or a file of premise, hypothesis and label
: "${EVAL_DATA:=hf:glue/mnli@validation_mismatched}" # rows to validate on
: "${OUT:=model_checkpoints/mnli_lora_cpu}" # checkpoints, train_log.jsonl, validation.json and answers.jsonl go here
: "${MAX_TRAIN_SAMPLES:=5000}"        # rows that are trained on
: "${MAX_EVAL_SAMPLES:=500}"          # rows that are validated on
: "${EPOCHS:=3}"                      # passes over them
: "${STAGES:=1}"                      # stages that the layers are cut into; several where one host's memory does not hold the model
: "${REPLICAS:=1}"                    # copies of the pipeline; one per socket
: "${NUM_THREADS:=}"                  # compute threads per rank; default: OMP_NUM_THREADS, else cores / ranks
: "${ALLOCATOR:=}"                    # a library that takes malloc's place (LD_PRELOAD); default: glibc's
: "${LORA_RANK:=18}"                  # rank of the adapters
: "${LORA_ALPHA:=54}"                 # their output is multiplied by LORA_ALPHA / LORA_RANK
: "${TARGETS:=q_proj,v_proj,k_proj,out_proj}" # linears that get adapters; GPT-NeoX: query_key_value,dense
: "${PRECISION=--bf16 true}"         # empty: fp32
: "${SEQ_LENGTH:=256}"                # tokens per sequence
: "${BATCH:=16}"                      # sequences per replica and step
: "${MICRO_BATCH:=4}"                 # sequences that are computed together; divides BATCH
: "${LR:=2e-4}"                       # highest learning rate
: "${EVAL_BATCH:=16}"                 # prompts that are answered together

# shellcheck source=example_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$@"
needs_number STAGES REPLICAS MAX_TRAIN_SAMPLES MAX_EVAL_SAMPLES
if [[ -n $ALLOCATOR ]]; then
    [[ -f $ALLOCATOR ]] || fail "ALLOCATOR must be a library's file; there is no $ALLOCATOR"
    export LD_PRELOAD=$ALLOCATOR${LD_PRELOAD:+:$LD_PRELOAD}
fi
read -r -a shared <<<"$PRECISION"
shared+=(--device cpu --pipeline-group-size "$STAGES")
if [[ -n $NUM_THREADS ]]; then shared+=(--num-threads "$NUM_THREADS"); fi

echo "--- training: $OUT"
run_ranks "$((STAGES * REPLICAS))" "$OUT/logs" dist_clm_train.py "${shared[@]}" --data-group-size "$REPLICAS" \
    --model-name "$MODEL" --task-name "mnli=$TRAIN_DATA" --max-train-samples "$MAX_TRAIN_SAMPLES" --num-train-epochs "$EPOCHS" \
    --loss-on completion --seq-length "$SEQ_LENGTH" --batch-size "$BATCH" --micro-batch-size "$MICRO_BATCH" --lr "$LR" \
    --warmup-proportion 0.05 --weight-decay 0 --train lora --lora-rank "$LORA_RANK" --lora-alpha "$LORA_ALPHA" \
    --lora-target-modules "$TARGETS" --checkpoint-path "$OUT" --checkpoint-steps 100 --keep-checkpoints 2 "$@"
checkpoint=$(newest_checkpoint "$OUT")

echo "--- validation: $checkpoint"
run_ranks "$STAGES" "$OUT/logs/validation" dist_clm_eval.py "${shared[@]}" --model-name "$checkpoint" --evaluation-data "mnli=$EVAL_DATA" \
    --max-eval-samples "$MAX_EVAL_SAMPLES" --metric accuracy --max-new-tokens 5 --batch-size "$EVAL_BATCH" \
    --json "$OUT/validation.json" --output "$OUT/answers.jsonl"
"$PYTHON" "$repo/example_scripts/results_table.py" "$OUT/validation.json"
