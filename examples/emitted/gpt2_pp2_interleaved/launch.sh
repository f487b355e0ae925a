#!/bin/sh
# Starts train.py on 1 node with 4 processes each; arguments go to train.py.
cd "$(dirname "$0")" || exit 2
NNODES=${NNODES:-1}
NPROC_PER_NODE=${NPROC_PER_NODE:-4}
if [ $((NNODES * NPROC_PER_NODE)) -ne 4 ]; then
    echo "launch.sh: this plan needs 4 processes (pp=2 x dp=2 x tp=1), not $NNODES x $NPROC_PER_NODE" >&2
    exit 2
fi
exec torchrun --standalone --nproc-per-node "$NPROC_PER_NODE" train.py "$@"
