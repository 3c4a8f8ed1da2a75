# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: deepseek-v3 on 256 GPUs, torchtitan 0.3.0.
# Note: Data, optimizer and learning rate are those of torchtitan's config; the plan sets neither them nor the 100 steps.
# Note: The prediction assumes that the busiest expert rank gets 1 times the mean.
# Note: Number format by torchao; layers whose sizes do not align stay in bf16.

# Section training.
TRAINING_ARGS=(
  --training.local-batch-size 1
  --training.global-batch-size 1024
  --training.seq-len 4096
  --training.steps 100
  --training.dtype float32
  --training.mixed-precision-param bfloat16
  --training.no-enable-cpu-offload
  --training.disable-cuda-graphs
)

# Section parallelism.
PARALLELISM_ARGS=(
  --parallelism.data-parallel-replicate-degree 1
  --parallelism.data-parallel-shard-degree 128
  --parallelism.fsdp-reshard-after-forward always
  --parallelism.tensor-parallel-degree 2
  --parallelism.enable-sequence-parallel
  --parallelism.pipeline-parallel-degree 1
  --parallelism.context-parallel-degree 1
  --parallelism.expert-parallel-degree 64
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
  activation-checkpoint:none
)
