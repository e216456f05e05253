#!/bin/sh
# Megatron-LM's own pretrain_gpt.py on several nodes, its sequences split over all GPUs: a Llama-3-8B of 131,072 tokens.
# What is not Megatron's is `seqpar megatron` before the script, and --seqpar-schedule.
#
# Run it in a checkout of Megatron-LM, on each node, with its number (the first is 0) and the first one's address:
#
#   NODES=2 NODE=0 FIRST=10.0.0.1 GPUS=8 sh /path/to/seqpar/examples/megatron_lm.sh
#
# More arguments are Megatron's, and the last of equal ones counts: --data-path my_text_document, --train-iters 10, ...
set -eu

NODES=${NODES:-1}
NODE=${NODE:-0}
FIRST=${FIRST:-localhost}
PORT=${PORT:-29500}
GPUS=${GPUS:-8}
RUN=${RUN:-seqpar megatron}
PRECISION=${PRECISION---bf16 --use-distributed-optimizer}

export CUDA_DEVICE_MAX_CONNECTIONS=1

# shellcheck disable=SC2086  # RUN and PRECISION are several words
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --master-addr "$FIRST" --master-port "$PORT" \
  --nproc-per-node "$GPUS" --no-python $RUN pretrain_gpt.py \
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 \
  --group-query-attention --num-query-groups 8 --swiglu --disable-bias-linear --normalization RMSNorm \
  --position-embedding-type rope --rotary-base 500000 --untie-embeddings-and-output-weights \
  --seq-length 131072 --max-position-embeddings 131072 --micro-batch-size 1 --global-batch-size 4 \
  --attention-dropout 0 --hidden-dropout 0 $PRECISION \
  --recompute-granularity selective --no-create-attention-mask-in-dataloader \
  --lr 1e-5 --train-iters 1000 --log-interval 1 --eval-iters 0 \
  --mock-data --tokenizer-type NullTokenizer --vocab-size 128255 \
  --context-parallel-size $((NODES * GPUS)) \
  --seqpar-schedule auto \
  "$@"
