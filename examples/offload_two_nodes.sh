#!/bin/sh
# Text from a model whose keys and values are on another machine: weights on a compute node, attention on a memory node.
#
# On the memory node, with the address at which the other one reaches it, and workers enough for its sockets or GPUs:
#
#   ADDRESS=10.0.0.2:29600 WORKERS=2 sh examples/offload_two_nodes.sh memory --memory 200
#
# On the compute node, once that has said that it is ready:
#
#   ADDRESS=10.0.0.2:29600 sh examples/offload_two_nodes.sh compute --model path/to/model --prompt-file long.txt
#
# Ctrl-C ends either. More arguments go to `seqpar attention-worker` and `seqpar generate`. Nothing guards the address
# but the network: let only the two nodes reach it.
set -eu

ROLE=${1:?memory or compute}
shift
ADDRESS=${ADDRESS:?HOST:PORT of the memory node}
WORKERS=${WORKERS:-1}
RANKS=${RANKS:-1}

case $ROLE in
memory)
  exec torchrun --standalone --nproc-per-node "$WORKERS" --no-python seqpar attention-worker --listen "$ADDRESS" "$@"
  ;;
compute)
  exec seqpar generate --nproc "$RANKS" --attention-workers "$ADDRESS" "$@"
  ;;
*)
  echo "role: got $ROLE, expected memory or compute" >&2
  exit 2
  ;;
esac
