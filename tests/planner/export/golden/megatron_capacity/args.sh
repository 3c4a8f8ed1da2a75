# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: mixtral-8x7b on 32 GPUs, Megatron-LM core_r0.16.
# Note: DATA_ARGS trains on random tokens with a null tokenizer; edit it for real data.
# Note: Learning rate, warm-up and the 100 iterations of TRAINING_ARGS are placeholders; the plan does not set them.
# Note: Rope base and scaling, norm epsilon and initialization keep Megatron's defaults; set them to continue from a checkpoint.
# Note: The gated MLP is written as SwiGLU.
# Note: The load-balancing loss and its coefficient are usual values; router scaling keeps Megatron's default.
# Note: The prediction assumes that the busiest expert rank gets 1 times the mean.
# Note: Experts drop tokens beyond 1.25 times their mean share.

# The model's shape.
MODEL_ARGS=(
  --num-layers 32
  --hidden-size 4096
  --ffn-hidden-size 14336
  --num-attention-heads 32
  --kv-channels 128
  --group-query-attention
  --num-query-groups 8
  --max-position-embeddings 32768
  --position-embedding-type rope
  --normalization RMSNorm
  --make-vocab-size-divisible-by 128
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --num-experts 8
  --moe-router-topk 2
  --moe-ffn-hidden-size 14336
  --moe-grouped-gemm
  --moe-token-dispatcher-type alltoall
  --moe-router-load-balancing-type aux_loss
  --moe-aux-loss-coeff 1.0e-2
  --moe-expert-capacity-factor 1.25
  --moe-pad-expert-input-to-capacity
)

# The plan.
PARALLEL_ARGS=(
  --tensor-model-parallel-size 2
  --pipeline-model-parallel-size 1
  --context-parallel-size 1
  --sequence-parallel
  --tp-comm-overlap
  --expert-model-parallel-size 8
  --expert-tensor-parallel-size 1
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
)

# Batch, precision, recompute, optimizer.
TRAINING_ARGS=(
  --micro-batch-size 1
  --global-batch-size 128
  --seq-length 8192
  --bf16
  --recompute-granularity selective
  --recompute-modules layernorm moe_act
  --train-iters 100
  --lr 3.0e-4
  --min-lr 3.0e-5
  --lr-decay-style cosine
  --lr-warmup-iters 10
  --weight-decay 0.1
  --clip-grad 1.0
  --log-interval 1
  --eval-iters 1
)

# EDIT HERE: random tokens for now; put your tokenizer and --data-path in place of all four lines.
DATA_ARGS=(
  --tokenizer-type NullTokenizer
  --vocab-size 31999
  --mock-data
  --split '99,1,0'
)
