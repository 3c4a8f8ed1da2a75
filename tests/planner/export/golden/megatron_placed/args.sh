# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: llama-3-8b on 32 GPUs, Megatron-LM core_r0.16.
# Note: DATA_ARGS trains on random tokens with a null tokenizer; edit it for real data.
# Note: Learning rate, warm-up and the 100 iterations of TRAINING_ARGS are placeholders; the plan does not set them.
# Note: Rope base and scaling, norm epsilon and initialization keep Megatron's defaults; set them to continue from a checkpoint.
# Note: The gated MLP is written as SwiGLU.

# The model's shape.
MODEL_ARGS=(
  --num-layers 32
  --hidden-size 4096
  --ffn-hidden-size 14336
  --num-attention-heads 32
  --kv-channels 128
  --group-query-attention
  --num-query-groups 8
  --max-position-embeddings 8192
  --position-embedding-type rope
  --normalization RMSNorm
  --make-vocab-size-divisible-by 64
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
)

# The plan.
PARALLEL_ARGS=(
  --tensor-model-parallel-size 4
  --pipeline-model-parallel-size 2
  --context-parallel-size 1
  --use-tp-pp-dp-mapping
  --sequence-parallel
  --tp-comm-overlap
  --overlap-grad-reduce
)

# Batch, precision, recompute, optimizer.
TRAINING_ARGS=(
  --micro-batch-size 1
  --global-batch-size 128
  --seq-length 8192
  --bf16
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
  --vocab-size 128255
  --mock-data
  --split '99,1,0'
)
