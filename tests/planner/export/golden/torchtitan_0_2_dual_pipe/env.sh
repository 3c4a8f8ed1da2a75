# shellcheck shell=bash
# Environment of every rank.
# Lets the allocator grow its segments, as torchtitan's own launcher does.
export PYTORCH_ALLOC_CONF=expandable_segments:True
