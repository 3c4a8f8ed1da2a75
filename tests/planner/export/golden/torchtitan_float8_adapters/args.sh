# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: llama-3.1-405b on 256 GPUs, torchtitan 0.3.0.
# Note: Data, optimizer and learning rate are those of torchtitan's config; the plan sets neither them nor the 100 steps.
# Note: Number format by torchao; layers whose sizes do not align stay in bf16.

# Section training.
TRAINING_ARGS=(
  --training.local-batch-size 1
  --training.global-batch-size 128
  --training.seq-len 8192
  --training.steps 100
  --training.dtype float32
  --training.mixed-precision-param bfloat16
  --training.no-enable-cpu-offload
  --training.disable-cuda-graphs
)

# Section parallelism.
PARALLELISM_ARGS=(
  --parallelism.data-parallel-replicate-degree 2
  --parallelism.data-parallel-shard-degree 8
  --parallelism.fsdp-reshard-after-forward always
  --parallelism.tensor-parallel-degree 8
  --parallelism.enable-sequence-parallel
  --parallelism.pipeline-parallel-degree 1
  --parallelism.context-parallel-degree 2
  --parallelism.expert-parallel-degree 1
)

# Section compile.
COMPILE_ARGS=(
  --compile.enable
  --compile.components 'model,loss'
  --compile.no-enable-async-tensor-parallel
)

# Section profiler.
PROFILER_ARGS=(
  --profiler.no-enable-profiling
)

# Recompute: a subcommand, which must come last.
ACTIVATION_CHECKPOINT_ARGS=(
  activation-checkpoint:full
)
