#!/usr/bin/env bash
# Fine-tune with torchrun, which numbers the ranks and starts them again when one dies: each restart goes on from the newest checkpoint.
#
#   TASKS=mine.jsonl OUT=model_checkpoints/mine example_scripts/finetune_torchrun.sh
#
# Several hosts: the same command on each, with the host's own number:
#   NNODES=2 NODE_RANK=0 MASTER_HOST=10.0.0.1 TASKS=mine.jsonl ... finetune_torchrun.sh      (NODE_RANK=1 on the other)
# Put the job's secret into DIST_SECRET on each (docs/security.md), and give --net-interface wg0 where they meet through a tunnel.
# The number of processes is NNODES x GPUS and must be a multiple of PIPELINE; the rest of it makes replicas. Further flags of
# dist_clm_train.py may follow on the command line.
set -euo pipefail

: "${MODEL:=pretrained_models/EleutherAI_gpt-j-6b}" # folder written by a converter, a Hugging Face folder, or a hub name
: "${TASKS:=}"                     # training data as --task-name takes it; must be given
: "${OUT:=model_checkpoints/torchrun}" # checkpoints and train_log.jsonl go here
: "${GPUS:=4}"                     # processes on this host, one GPU each
: "${PIPELINE:=2}"                 # stages that the layers are cut into
: "${NNODES:=1}"                   # hosts
: "${NODE_RANK:=0}"                # this host's number
: "${MASTER_HOST:=127.0.0.1}"      # address of host 0, as the others reach it
: "${PORT:=29500}"                 # a port that is free there
: "${MAX_RESTARTS:=3}"             # restarts until torchrun gives up
: "${SEQ_LENGTH:=2048}"            # tokens per sequence
: "${BATCH:=8}"                    # sequences per replica and accumulation step
: "${TOTAL_STEPS:=2000}"           # accumulation steps altogether
: "${CHECKPOINT_STEPS:=200}"       # steps between checkpoints; what a restart loses at most
: "${LR:=1e-5}"                    # highest learning rate
: "${PYTHON:=}"                    # interpreter; default: the .venv that `make setup` made, else python3

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -nE '2,/^set -/{/^#/s/^# ?//p}; s/^: "\$\{([A-Z_]+):?=(.*)\}"/  \1=\2/p' "$0"
    exit 0
fi
if [[ -z $TASKS ]]; then
    echo "finetune_torchrun.sh: name the training data, for instance TASKS=mine.jsonl; $0 --help lists all settings" >&2
    exit 2
fi
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z $PYTHON ]]; then
    PYTHON=python3
    if [[ -x $repo/.venv/bin/python ]]; then PYTHON=$repo/.venv/bin/python; fi
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS" \
    --master-addr "$MASTER_HOST" --master-port "$PORT" --max-restarts "$MAX_RESTARTS" \
    "$repo/dist_clm_train.py" --pipeline-group-size "$PIPELINE" --model-name "$MODEL" --task-name "$TASKS" --checkpoint-path "$OUT" \
    --bf16 true --seq-length "$SEQ_LENGTH" --batch-size "$BATCH" --total-steps "$TOTAL_STEPS" --warmup-steps "$((TOTAL_STEPS / 20))" \
    --lr "$LR" --checkpoint-steps "$CHECKPOINT_STEPS" "$@"
