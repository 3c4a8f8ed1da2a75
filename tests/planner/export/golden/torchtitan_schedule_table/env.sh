# shellcheck shell=bash
# Environment of every rank.
# Lets the allocator grow its segments, as torchtitan's own launcher does.
export PYTORCH_ALLOC_CONF=expandable_segments:True
# The registered model; give another one of the same shape here.
export TORCHTITAN_MODEL="${TORCHTITAN_MODEL:-meshwright_model:train}"
export PYTHONPATH="$EXPORT_DIR${PYTHONPATH:+:$PYTHONPATH}"
