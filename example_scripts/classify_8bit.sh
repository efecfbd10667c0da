#!/usr/bin/env bash
# Classify the texts of a CSV with a base model in int8, in every way there is here, and compare them in one table.
#
#   TRAIN_DATA=train.csv EVAL_DATA=test.csv OUT=model_checkpoints/classify example_scripts/classify_8bit.sh
#
# The CSV has a column of texts and one of labels (text or sentence, label or category; others by TEXT_COLUMN and LABEL_COLUMN); .tsv,
# .jsonl and .parquet do as well. The base lies in int8, a scale per row: 6 GB for GPT-J, on one card of 11 GB or in a CPU's memory.
#   layernorm        trains the LayerNorms alone: 238 thousand parameters of GPT-J
#   lora-attention   adapters beside the attention's linears
#   lora-all         adapters beside all linears of a layer
#   few-shot         trains nothing: SHOTS worked examples of the training data stand in front of every prompt, labels in turn
# Each with two prompts: `instruction` names the labels and asks for one, `raw` is the text alone. The loss is on the label; as many rows of
# every label are drawn (BALANCE=true). Accuracy is of answers generated greedily and compared exactly; `likeliest label` is that of the
# label with the highest log-likelihood, which cannot be badly formed.
#
# Run it again to go on: trainings resume, and evaluations are done again only where their training went on. METHODS=few-shot adds a row to
# an earlier table. One process on one GPU or CPU; STAGES cuts a larger model over several. Flags behind the script's name go to
# dist_clm_train.py.
set -euo pipefail

: "${MODEL:=pretrained_models/EleutherAI_gpt-j-6b}" # folder written by a converter, a Hugging Face folder, or a hub name
: "${TRAIN_DATA:=data/train.csv}"     # rows to train on, and to draw worked examples from
: "${EVAL_DATA:=data/test.csv}"       # rows to evaluate on
: "${TEXT_COLUMN:=}"                  # default: text, sentence, message or sms
: "${LABEL_COLUMN:=}"                 # default: label, category, class or intent
: "${OUT:=model_checkpoints/classify}" # a folder per way, results/*.json, answers/*.jsonl and table.txt go here
: "${METHODS:=layernorm lora-attention lora-all few-shot}" # the ways to compare
: "${PROMPTS:=instruction raw}"       # the prompts to compare
: "${SHOTS:=4}"                       # worked examples of few-shot
: "${BALANCE:=true}"                  # draw as many rows of every label
: "${STEPS:=300}"                     # steps of each training
: "${SEQ_LENGTH:=512}"                # tokens per sequence; a few-shot prompt is evaluated at the model's full length
: "${BATCH:=8}"                       # sequences per step
: "${MICRO_BATCH:=1}"                 # sequences that are computed together; divides BATCH
: "${LR_LAYERNORM:=2e-3}"             # highest learning rate of layernorm
: "${LR_LORA:=2e-4}"                  # of both lora
: "${LORA_RANK:=8}"                   # rank of the adapters
: "${LORA_ALPHA:=16}"                 # their output is multiplied by LORA_ALPHA / LORA_RANK
: "${ATTENTION:=q_proj,k_proj,v_proj,out_proj}" # the attention's linears; GPT-NeoX: query_key_value,dense
: "${PRECISION=--bf16 true}"         # of everything but the base; empty: fp32
: "${STAGES:=1}"                      # stages that the layers are cut into
: "${MAX_EVAL_SAMPLES:=}"             # evaluate on that many rows; default: all of them
: "${MAX_NEW_TOKENS:=8}"              # tokens of an answer; as many as the longest label takes, and its end
: "${EVAL_BATCH:=8}"                  # prompts that are answered together

# shellcheck source=example_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$@"
needs_number STAGES STEPS SHOTS
read -r -a methods <<<"$METHODS"
read -r -a prompts <<<"$PROMPTS"
for method in "${methods[@]}"; do
    [[ " layernorm lora-attention lora-all few-shot " == *" $method "* ]] ||
        fail "METHODS are layernorm, lora-attention, lora-all and few-shot; one of them is '$method'"
done
read -r -a shared <<<"$PRECISION"
shared+=(--pipeline-group-size "$STAGES" --base-quantization int8)
if [[ -n $TEXT_COLUMN ]]; then shared+=(--text-column "$TEXT_COLUMN"); fi
if [[ -n $LABEL_COLUMN ]]; then shared+=(--label-column "$LABEL_COLUMN"); fi
mkdir -p "$OUT/results" "$OUT/answers"

train() { # train METHOD PROMPT FLAG...: into OUT/METHOD.PROMPT
    local name=$1.$2
    local -a how
    case $1 in
    layernorm) how=(--train layernorm --lr "$LR_LAYERNORM") ;;
    lora-attention) how=(--train lora --lora-target-modules "$ATTENTION" --lr "$LR_LORA") ;;
    lora-all) how=(--train lora --lora-target-modules all-linear --lr "$LR_LORA") ;;
    esac
    if [[ $1 == lora-* ]]; then how+=(--lora-rank "$LORA_RANK" --lora-alpha "$LORA_ALPHA"); fi
    echo "--- training: $name"
    run_ranks "$STAGES" "$OUT/$name/logs" dist_clm_train.py "${shared[@]}" "${how[@]}" --model-name "$MODEL" \
        --task-name "classification=$TRAIN_DATA" --classification-prompt "$2" --balance-labels "$BALANCE" --loss-on completion \
        --seq-length "$SEQ_LENGTH" --batch-size "$BATCH" --micro-batch-size "$MICRO_BATCH" --total-steps "$STEPS" --warmup-proportion 0.05 \
        --weight-decay 0 --checkpoint-path "$OUT/$name" --checkpoint-steps 100 --keep-checkpoints 1 "${@:3}"
}

evaluate() { # evaluate MODEL METHOD PROMPT FLAG...: into OUT/results/METHOD.PROMPT.json
    local name=$2.$3
    local -a few=()
    if [[ -n $MAX_EVAL_SAMPLES ]]; then few=(--max-eval-samples "$MAX_EVAL_SAMPLES"); fi
    echo "--- evaluation: $name"
    run_ranks "$STAGES" "$OUT/logs/$name" dist_clm_eval.py "${shared[@]}" --model-name "$1" --classification-prompt "$3" \
        --evaluation-data "classification=$EVAL_DATA" --metric accuracy,labels --max-new-tokens "$MAX_NEW_TOKENS" \
        --batch-size "$EVAL_BATCH" ${few[@]+"${few[@]}"} --json "$OUT/results/$name.json" --output "$OUT/answers/$name.jsonl" "${@:4}"
}

for prompt in "${prompts[@]}"; do
    for method in "${methods[@]}"; do
        result=$OUT/results/$method.$prompt.json
        if [[ $method == few-shot ]]; then
            if [[ -f $result ]]; then continue; fi
            evaluate "$MODEL" "$method" "$prompt" --num-shots "$SHOTS" --shots-from "classification=$TRAIN_DATA" --balance-shots true
            continue
        fi
        train "$method" "$prompt" "$@"
        checkpoint=$(newest_checkpoint "$OUT/$method.$prompt")
        if [[ $result -nt $checkpoint ]]; then continue; fi
        evaluate "$checkpoint" "$method" "$prompt"
    done
done

echo "--- $OUT/table.txt"
"$PYTHON" "$repo/example_scripts/results_table.py" "$OUT"/results/*.json | tee "$OUT/table.txt"
