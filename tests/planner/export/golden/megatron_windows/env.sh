# shellcheck shell=bash
# Environment of every rank.
# Megatron-FSDP overlaps its gathers with compute, which one hardware queue would serialize.
unset CUDA_DEVICE_MAX_CONNECTIONS
