#!/usr/bin/env bash
# Fine-tune GPT-J or GPT-NeoX with pipeline and data parallelism: one process per stage and replica, all started from here.
#
#   MODEL=pretrained_models/EleutherAI_gpt-j-6b TASKS=mine.jsonl OUT=model_checkpoints/mine example_scripts/finetune_gptj.sh
#
# Every setting is an environment variable, listed below with its default; further flags of dist_clm_train.py may follow on the
# command line: finetune_gptj.sh --min-lr 1e-6. Run the same command again to resume from the newest checkpoint in OUT.
# The first rank writes to this terminal, rank N to OUT/logs/rank_N.log. When one rank fails, the end of its log is shown, the others
# are stopped, and the script returns that rank's exit code. Ctrl-C lets them save after the current step and end; a second one stops
# them at once (kill -9 of this script cannot: its ranks go on).
#
# Several hosts: start it on each with the same settings; RANK0_HOST is the address of the one that runs rank 0, RANKS a host's share:
#   host A:  RANK0_HOST=10.0.0.1 RANKS="0 1" ... finetune_gptj.sh
#   host B:  RANK0_HOST=10.0.0.1 RANKS="2 3" ... finetune_gptj.sh
set -uo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^grace_s=/p' "${BASH_SOURCE[0]}" | grep -E '^#|^: ' | sed -E 's/^# ?//; s/^: "\$\{(.*):=(.*)\}"/  \1=\2/'
    exit 0
fi

# --- what is trained, on what, to where -------------------------------------------------------------------------------------------
: "${MODEL:=pretrained_models/EleutherAI_gpt-j-6b}"   # folder written by convert_from_hf_gptj.py or _gptneox.py, a Hugging Face folder, or a hub name
: "${TOKENIZER:=$MODEL}"           # folder or hub name of the tokenizer
: "${TASKS:=}"                     # a.jsonl:0.7,b.jsonl.zst:0.3  files of {"text": ...} records with their shares; must be given
: "${OUT:=model_checkpoints/gptj}" # checkpoints, train_log.jsonl and logs/ go here; one job per folder
# --- the grid: PIPELINE x REPLICAS processes, one per device ----------------------------------------------------------------------
: "${PIPELINE:=2}"                 # stages that the layers are cut into
: "${REPLICAS:=2}"                 # copies of the pipeline, each on its own share of the batch
: "${RANKS:=}"                     # ranks that run on this host, "0 1"; default: all of them
: "${RANK0_HOST:=127.0.0.1}"       # address of the host of rank 0, as the other hosts reach it
: "${PORT:=29500}"                 # a port that is free there
: "${NET_INTERFACE:=}"             # network interface that carries the traffic (eth0, wg0); default: the one that routes to RANK0_HOST
: "${DP_BACKEND:=}"                # nccl or gloo; default: nccl on GPUs, gloo on CPU
: "${DEVICE:=auto}"                # auto, cpu or cuda
: "${NUM_THREADS:=}"               # compute threads per process; default: OMP_NUM_THREADS, else cores / processes here
# --- the batch: BATCH x REPLICAS x ACCUMULATE sequences of SEQ_LENGTH tokens per optimizer step -----------------------------------
: "${SEQ_LENGTH:=2048}"            # tokens per sequence
: "${BATCH:=8}"                    # sequences per replica and accumulation step
: "${MICRO_BATCH:=1}"              # sequences that travel through the pipeline together; divides BATCH
: "${ACCUMULATE:=1}"               # accumulation steps per optimizer step
# --- the schedule; steps count accumulation steps ---------------------------------------------------------------------------------
: "${TOTAL_STEPS:=2000}"           # steps altogether
: "${WARMUP_STEPS:=$((TOTAL_STEPS / 20))}" # steps until LR is reached; default: one step in twenty
: "${LR:=1e-5}"                    # highest learning rate
: "${CHECKPOINT_STEPS:=500}"       # steps between checkpoints; 0: only the final one
: "${LOGGING_STEPS:=10}"           # steps between log lines
: "${SEED:=42}"                    # order of the data
: "${LOG_BACKEND:=print}"          # print, or wandb
# --- the programs -----------------------------------------------------------------------------------------------------------------
: "${PYTHON:=}"                    # interpreter; default: the .venv that `make setup` made, else python3
: "${TRAINER:=$repo/dist_clm_train.py}" # the program started once per rank
grace_s=10                         # seconds between asking a rank to stop and killing it

if [[ -z $TASKS ]]; then
    echo "finetune_gptj.sh: name the training data, for instance TASKS=mine.jsonl; $0 --help lists all settings" >&2
    exit 2
fi
for setting in PIPELINE REPLICAS; do
    if ! [[ ${!setting} =~ ^[1-9][0-9]*$ ]]; then
        echo "finetune_gptj.sh: $setting must be a number of at least 1; it is '${!setting}'" >&2
        exit 2
    fi
done
if [[ -z $PYTHON ]]; then
    PYTHON=python3
    [[ -x $repo/.venv/bin/python ]] && PYTHON=$repo/.venv/bin/python
fi
world_size=$((PIPELINE * REPLICAS))
[[ -n $RANKS ]] || RANKS=$(seq -s ' ' 0 $((world_size - 1)))
read -r -a ranks <<<"$RANKS"
mkdir -p "$OUT/logs" || exit 1

flags=(
    --model-name "$MODEL" --tokenizer-name "$TOKENIZER" --load-pretrained-model true
    --task-name "$TASKS" --checkpoint-path "$OUT" --checkpoint-steps "$CHECKPOINT_STEPS"
    --dist-url "tcp://$RANK0_HOST:$PORT" --world-size "$world_size" --pipeline-group-size "$PIPELINE" --data-group-size "$REPLICAS"
    --device "$DEVICE" --dp-mode allreduce --optimizer adam
    --seq-length "$SEQ_LENGTH" --batch-size "$BATCH" --micro-batch-size "$MICRO_BATCH" --gradient-accumulate-step "$ACCUMULATE"
    --total-steps "$TOTAL_STEPS" --warmup-steps "$WARMUP_STEPS" --lr "$LR" --seed "$SEED"
    --logging-steps "$LOGGING_STEPS" --train-log-backend "$LOG_BACKEND"
)
[[ -n $NET_INTERFACE ]] && flags+=(--net-interface "$NET_INTERFACE")
[[ -n $DP_BACKEND ]] && flags+=(--dp-backend "$DP_BACKEND")
[[ -n $NUM_THREADS ]] && flags+=(--num-threads "$NUM_THREADS")

declare -A pid_of=()  # rank -> process id of every rank that still runs
worst=0

# Each rank leads a process group of its own (set -m), so that stopping it also stops its data workers, and Ctrl-C comes here first.
set -m

stop_all() {
    local rank waited
    ((${#pid_of[@]} > 0)) || return 0
    for rank in "${!pid_of[@]}"; do kill -TERM -- "-${pid_of[$rank]}" 2>/dev/null; done
    for ((waited = 0; waited < grace_s * 10; waited++)); do
        for rank in "${!pid_of[@]}"; do kill -0 -- "-${pid_of[$rank]}" 2>/dev/null && break; done || break
        sleep 0.1
    done
    for rank in "${!pid_of[@]}"; do
        kill -KILL -- "-${pid_of[$rank]}" 2>/dev/null
        wait "${pid_of[$rank]}" 2>/dev/null
    done
    pid_of=()
}

stopped_by=0  # exit code of the first signal
on_signal() {  # $1: exit code
    if ((stopped_by > 0)); then
        trap '' INT TERM HUP
        printf '\nfinetune_gptj.sh: stopping all ranks at once\n' >&2
        exit "$1"
    fi
    stopped_by=$1
    printf '\nfinetune_gptj.sh: all ranks save after this step and end; once more to stop them at once\n' >&2
    for rank in "${!pid_of[@]}"; do kill -TERM "${pid_of[$rank]}" 2>/dev/null; done
}
trap 'on_signal 130' INT
trap 'on_signal 143' TERM
trap 'on_signal 129' HUP
trap stop_all EXIT  # the one place where ranks are stopped, whatever made the script end

for local in "${!ranks[@]}"; do
    rank=${ranks[$local]}
    command=("$PYTHON" "$TRAINER" "${flags[@]}" --rank "$rank" --cuda-id "$local" "$@")
    if ((local == 0)); then
        "${command[@]}" </dev/null &
    else
        log=$OUT/logs/rank_$rank.log
        echo "=== started $(date '+%F %T')" >>"$log"
        "${command[@]}" </dev/null >>"$log" 2>&1 &
    fi
    pid_of[$rank]=$!
done
set +m  # the groups stay; bash no longer announces each job that ends

while ((${#pid_of[@]} > 0)); do
    for rank in "${!pid_of[@]}"; do
        kill -0 "${pid_of[$rank]}" 2>/dev/null && continue
        wait "${pid_of[$rank]}" 2>/dev/null
        code=$?
        ((code == 0)) && { unset "pid_of[$rank]"; continue; }
        ((stopped_by > 0)) && exit "$stopped_by"  # it was told to stop before it had anything to save
        ((code > worst)) && worst=$code
        echo "finetune_gptj.sh: rank $rank failed with exit code $code; stopping the others" >&2
        if [[ $rank != "${ranks[0]}" ]]; then
            echo "--- the end of $OUT/logs/rank_$rank.log:" >&2
            tail -n 30 "$OUT/logs/rank_$rank.log" | tac | sed '/^=== started/q' | tac | sed 's/^/    /' >&2  # this run's part only
        fi
    done
    ((worst > 0)) && exit "$worst"
    sleep 0.2
done
exit "$stopped_by"
