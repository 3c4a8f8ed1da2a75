# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: deepseek-v3 on 256 GPUs, Megatron-LM core_r0.16.
# Note: DATA_ARGS trains on random tokens with a null tokenizer; edit it for real data.
# Note: Learning rate, warm-up and the 100 iterations of TRAINING_ARGS are placeholders; the plan does not set them.
# Note: Rope base and scaling, norm epsilon and initialization keep Megatron's defaults; set them to continue from a checkpoint.
# Note: The gated MLP is written as SwiGLU.
# Note: The load-balancing loss and its coefficient are usual values; router scaling keeps Megatron's default.
# Note: The prediction assumes that the busiest expert rank gets 1 times the mean.
# Note: Experts drop no tokens.
# Note: The loss of multi-token prediction keeps Megatron's default weight.

# The model's shape.
MODEL_ARGS=(
  --num-layers 61
  --hidden-size 7168
  --ffn-hidden-size 18432
  --num-attention-heads 128
  --multi-latent-attention
  --qk-layernorm
  --q-lora-rank 1536
  --kv-lora-rank 512
  --qk-head-dim 128
  --qk-pos-emb-head-dim 64
  --v-head-dim 128
  --max-position-embeddings 4096
  --position-embedding-type rope
  --normalization RMSNorm
  --make-vocab-size-divisible-by 128
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --num-experts 256
  --moe-router-topk 8
  --moe-ffn-hidden-size 2048
  --moe-grouped-gemm
  --moe-token-dispatcher-type alltoall
  --moe-shared-expert-intermediate-size 2048
  --moe-router-score-function sigmoid
  --moe-router-enable-expert-bias
  --moe-router-num-groups 8
  --moe-router-group-topk 4
  --moe-router-load-balancing-type seq_aux_loss
  --moe-aux-loss-coeff 1.0e-4
  --moe-layer-freq '[0]*3+[1]*58'
  --mtp-num-layers 1
)

# The plan.
PARALLEL_ARGS=(
  --tensor-model-parallel-size 2
  --pipeline-model-parallel-size 8
  --context-parallel-size 1
  --sequence-parallel
  --tp-comm-overlap
  --expert-model-parallel-size 32
  --expert-tensor-parallel-size 1
  --pipeline-model-parallel-layout 'Et*7|t*8|t*8|t*8|t*8|t*8|t*8|t*6mL'
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
)

# Batch, precision, recompute, optimizer.
TRAINING_ARGS=(
  --micro-batch-size 1
  --global-batch-size 4096
  --seq-length 4096
  --bf16
  --fp8-format e4m3
  --fp8-recipe blockwise
  --recompute-granularity selective
  --recompute-modules core_attn
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
  --vocab-size 129279
  --mock-data
  --split '99,1,0'
)
