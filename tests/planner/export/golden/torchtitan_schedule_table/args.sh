# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: llama-3-8b on 16 GPUs, torchtitan 0.3.0.
# Note: Data, optimizer and learning rate are those of torchtitan's config; the plan sets neither them nor the 100 steps.
# Note: torch refuses this schedule on compiled layers, so only the loss is compiled.

# Section training.
TRAINING_ARGS=(
  --training.local-batch-size 6
  --training.global-batch-size 24
  --training.seq-len 8192
  --training.steps 100
  --training.dtype float32
  --training.mixed-precision-param bfloat16
  --training.no-enable-cpu-offload
  --training.disable-cuda-graphs
)

# Section parallelism.
PARALLELISM_ARGS=(
  --parallelism.data-parallel-replicate-degree 1
  --parallelism.data-parallel-shard-degree 4
  --parallelism.fsdp-reshard-after-forward default
  --parallelism.tensor-parallel-degree 1
  --parallelism.pipeline-parallel-degree 4
  --parallelism.pipeline-parallel-schedule ZBVZeroBubble
  --parallelism.pipeline-parallel-microbatch-size 1
  --parallelism.module-fqns-per-model-part 'tok_embeddings,layers.0,layers.1,layers.2,layers.3' 'layers.4,layers.5,layers.6,layers.7' 'layers.8,layers.9,layers.10,layers.11' 'layers.12,layers.13,layers.14,layers.15' 'layers.16,layers.17,layers.18,layers.19' 'layers.20,layers.21,layers.22,layers.23' 'layers.24,layers.25,layers.26,layers.27' 'layers.28,layers.29,layers.30,layers.31,norm,lm_head'
  --parallelism.context-parallel-degree 1
  --parallelism.expert-parallel-degree 1
)

# Section compile.
COMPILE_ARGS=(
  --compile.enable
  --compile.components loss
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
