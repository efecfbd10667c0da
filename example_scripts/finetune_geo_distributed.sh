#!/usr/bin/env bash
# Fine-tune one model with the GPUs of two sites that see each other over the internet. Start it at both, with the same settings:
#
#   site a:  SITE=a SITE_A_HOST=10.8.0.1 TASKS=mine.jsonl OUT=/data/mine example_scripts/finetune_geo_distributed.sh
#   site b:  SITE=b SITE_A_HOST=10.8.0.1 TASKS=mine.jsonl OUT=/data/mine example_scripts/finetune_geo_distributed.sh
#
# What crosses the long link. The pipeline is cut between the sites: stages 0 .. SPLIT-1 of every replica run at a, the others at b. So
# activations of micro-batches travel far (GPT-J, one sequence of 2048: 32 MiB in fp32, 8 as int8), and the gradients of a stage, 4 bytes
# a parameter and step, are summed over replicas within a site. The other way round it would be those that travel: 24 GB a step for GPT-J.
# WIRE=int8 rounds activations to 8 bits with a scale per row; the log names the error that this makes. ACCUMULATE steps pass without
# emptying the pipeline, and --extra-warmup-forwards (auto) sends as many micro-batches ahead as the round trip measured at the start asks
# for.
#
# Interface and firewall. All traffic of a process uses the addresses of one interface, NET_INTERFACE, and is not encrypted: take a tunnel.
# With WireGuard (each site: one [Interface] with Address = 10.8.0.1/24 or 10.8.0.2/24, ListenPort = 51820, MTU = 1380 or what the path
# holds, one [Peer] with AllowedIPs of the other, PersistentKeepalive = 25 behind NAT) the world outside needs one open door:
#   ufw allow in proto udp to any port 51820
# Inside the tunnel every rank connects to every other in both directions, rank 0 listens at PORT, all else at ports that the system
# chooses; so the tunnel's interface is opened to the other site's address as a whole, and to nobody else:
#   ufw allow in on wg0 from 10.8.0.2      (at a; 10.8.0.1 at b)
# Where only a range may be open, choose it at both sites: sysctl -w net.ipv4.ip_local_port_range="40000 45000", and open PORT besides.
# Try it first: nc -l 10.8.0.1 29500 at a, nc -vz 10.8.0.1 29500 at b; and iperf3 for what the link carries.
#
# Disks. MODEL lies at both sites (each rank reads its own layers), TASKS at a alone. OUT is a folder at each site: the ranks find out that
# these are two disks, each keeps its own layers, and a resume needs both. `python -m checkpoint.gather` makes one checkpoint of them.
# A site that vanishes ends the job at the other within seconds of the notice; start both again and they go on from the newest checkpoint.
# All other settings are those of finetune_gptj.sh (--help lists them); further flags of dist_clm_train.py may follow.
set -euo pipefail

: "${SITE:=}"               # a or b: which of the two this is; must be given
: "${SITE_A_HOST:=}"        # address of the host at site a, in the tunnel; must be given
: "${NET_INTERFACE:=wg0}"   # interface of the tunnel, by its name here
: "${PIPELINE:=4}"          # stages that the layers are cut into, both sites together
: "${SPLIT:=$((PIPELINE / 2))}" # stages at site a; default: half of them. Each site needs one GPU per stage of its own and replica
: "${REPLICAS:=1}"          # copies of the pipeline
: "${WIRE:=int8}"           # form of activations and their gradients between stages: none, bf16, fp16, int8, int4
: "${BATCH:=16}"            # sequences per replica and accumulation step
: "${ACCUMULATE:=4}"        # accumulation steps per optimizer step; more of them hide the link better
: "${CHECKPOINT_STEPS:=200}" # accumulation steps between checkpoints; links between sites break

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -nE '2,/^set -/{/^#/s/^# ?//p}; s/^: "\$\{([A-Z_]+):?=(.*)\}"/  \1=\2/p' "$0"
    exit 0
fi
fail() {
    echo "finetune_geo_distributed.sh: $1; $0 --help tells more" >&2
    exit 2
}
[[ $SITE == a || $SITE == b ]] || fail "SITE must be a or b; it is '$SITE'"
[[ -n $SITE_A_HOST ]] || fail "SITE_A_HOST must be the address of site a's host, such as 10.8.0.1"
for setting in PIPELINE SPLIT REPLICAS; do
    [[ ${!setting} =~ ^[1-9][0-9]*$ ]] || fail "$setting must be a whole number of at least 1; it is '${!setting}'"
done
((SPLIT < PIPELINE)) || fail "SPLIT must leave site b a stage: less than PIPELINE, $PIPELINE; it is $SPLIT"

RANKS="" # rank r is stage r % PIPELINE of replica r / PIPELINE
for ((rank = 0; rank < PIPELINE * REPLICAS; rank++)); do
    if ((rank % PIPELINE < SPLIT)); then here=a; else here=b; fi
    if [[ $here == "$SITE" ]]; then RANKS+="$rank "; fi
done
export NET_INTERFACE PIPELINE REPLICAS BATCH ACCUMULATE CHECKPOINT_STEPS RANKS RANK0_HOST=$SITE_A_HOST
export DP_BACKEND=${DP_BACKEND:-gloo} # plain TCP connections, which every tunnel carries; nccl has opinions of its own about networks
exec "$(dirname "${BASH_SOURCE[0]}")/finetune_gptj.sh" --wire-dtype "$WIRE" "$@"
