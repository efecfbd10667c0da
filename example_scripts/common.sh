# shellcheck shell=bash
# What the workflows beside this file share: their help, the ranks of one job on this host, and the end of all of them. For `source`.
#
# A job is one process per rank: rank 0 writes to this terminal, rank N to FOLDER/rank_N.log. When one fails, the end of its log is shown,
# the others are stopped and so is the workflow, with that rank's exit code. Ctrl-C lets a training save after its step; the workflow ends
# there, and goes on from there when it is started again. A second Ctrl-C stops everything at once.
#
# Read from the environment by all workflows:
#   PYTHON  interpreter; default: the .venv that `make setup` made, else python3
#   PORT    a free port of this host; default: 29500
#   CORES   lists of cores, one per rank, "0-27 28-55": each rank is pinned to its own (taskset); default: no pinning

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
this=$(basename "$0")
grace_s=20 # seconds between asking a rank to stop and killing it

: "${PORT:=29500}"
: "${CORES:=}"
: "${PYTHON:=}"
if [[ -z $PYTHON ]]; then
    PYTHON=python3
    if [[ -x $repo/.venv/bin/python ]]; then PYTHON=$repo/.venv/bin/python; fi
fi

# Ends the script with its header and its settings if that is what was asked for. $1: its first argument, or nothing.
help_if_asked() {
    [[ ${1:-} == -h || ${1:-} == --help ]] || return 0
    sed -nE '2,/^set -/{/^#/s/^# ?//p}; s/^: "\$\{([A-Z_]+):?=(.*)\}"/  \1=\2/p' "$0"
    exit 0
}

fail() {
    echo "$this: $1; $0 --help lists all settings" >&2
    exit 2
}

# needs_number NAME...: each is a setting that must be a whole number of at least 1.
needs_number() {
    local setting
    for setting in "$@"; do
        [[ ${!setting} =~ ^[1-9][0-9]*$ ]] || fail "$setting must be a whole number of at least 1; it is '${!setting}'"
    done
}

declare -A pid_of=() # rank -> process id of every rank that still runs
stopped_by=0         # exit code of the first signal

on_signal() { # $1: exit code
    local rank
    if ((stopped_by > 0)); then exit "$1"; fi
    stopped_by=$1
    if ((${#pid_of[@]} == 0)); then exit "$1"; fi
    printf '\n%s: all ranks end (a training after its step, saved); once more to stop them at once\n' "$this" >&2
    for rank in "${!pid_of[@]}"; do kill -TERM "${pid_of[$rank]}" 2>/dev/null || true; done
}

stop_all() {
    local rank waited
    trap '' INT TERM HUP
    for rank in "${!pid_of[@]}"; do kill -TERM -- "-${pid_of[$rank]}" 2>/dev/null || true; done
    for ((waited = 0; waited < grace_s * 10 && ${#pid_of[@]} > 0; waited++)); do
        for rank in "${!pid_of[@]}"; do kill -0 "${pid_of[$rank]}" 2>/dev/null || unset "pid_of[$rank]"; done
        sleep 0.1
    done
    for rank in "${!pid_of[@]}"; do kill -KILL -- "-${pid_of[$rank]}" 2>/dev/null || true; done
}
trap 'on_signal 130' INT
trap 'on_signal 143' TERM
trap 'on_signal 129' HUP
trap stop_all EXIT

# run_ranks NUM FOLDER PROGRAM FLAG...: a program of this repository as NUM ranks, one GPU and one entry of CORES each.
run_ranks() {
    local num=$1 folder=$2 program=$3 rank code
    shift 3
    local -a pinned cores
    read -r -a cores <<<"$CORES"
    if ((${#cores[@]} > 0 && ${#cores[@]} < num)); then fail "CORES has ${#cores[@]} lists of cores for $num ranks; give each its own"; fi
    mkdir -p "$folder"
    set -m # every rank leads a process group of its own: Ctrl-C comes here first, and a rank's children end with it
    for ((rank = 0; rank < num; rank++)); do
        pinned=()
        if ((${#cores[@]} > 0)); then pinned=(taskset -c "${cores[$rank]}"); fi
        local -a command=(
            ${pinned[@]+"${pinned[@]}"} "$PYTHON" "$repo/$program" --rank "$rank" --cuda-id "$rank" --world-size "$num"
            --dist-url "tcp://127.0.0.1:$PORT" "$@"
        )
        if ((rank == 0)); then "${command[@]}" </dev/null & else "${command[@]}" </dev/null >"$folder/rank_$rank.log" 2>&1 & fi
        pid_of[$rank]=$!
    done
    set +m
    while ((${#pid_of[@]} > 0)); do
        for rank in "${!pid_of[@]}"; do
            if kill -0 "${pid_of[$rank]}" 2>/dev/null; then continue; fi
            code=0
            wait "${pid_of[$rank]}" || code=$?
            unset "pid_of[$rank]"
            if ((code == 0 || stopped_by > 0)); then continue; fi
            echo "$this: rank $rank of $program failed with exit code $code" >&2
            if ((rank > 0)); then tail -n 30 "$folder/rank_$rank.log" | sed 's/^/    /' >&2; fi
            exit "$code"
        done
        sleep 0.1
    done
    if ((stopped_by > 0)); then exit "$stopped_by"; fi
}

# newest_checkpoint FOLDER: the step folder with the highest number, a Hugging Face folder or a peft folder.
newest_checkpoint() {
    local newest
    newest=$(find "$1" -mindepth 1 -maxdepth 1 -type d -name '[0-9]*' -printf '%f\n' | grep -xE '[0-9]+' | sort -n | tail -n 1 || true)
    if [[ -z $newest ]]; then
        echo "$this: there is no checkpoint in $1" >&2
        return 1
    fi
    echo "$1/$newest"
}
