# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: gpt3-175b on 128 GPUs, Megatron-LM core_r0.16.
# Note: DATA_ARGS trains on random tokens with a null tokenizer; edit it for real data.
# Note: Learning rate, warm-up and the 100 iterations of TRAINING_ARGS are placeholders; the plan does not set them.
# Note: Rope base and scaling, norm epsilon and initialization keep Megatron's defaults; set them to continue from a checkpoint.
# Note: The vocabulary of 50257 is padded to 51200 rows so that tp 8 splits it.
# Note: The MLP activation is Megatron's default GELU.

# The model's shape.
MODEL_ARGS=(
  --num-layers 96
  --hidden-size 12288
  --ffn-hidden-size 49152
  --num-attention-heads 96
  --kv-channels 128
  --max-position-embeddings 2048
  --position-embedding-type learned_absolute
  --normalization LayerNorm
  --make-vocab-size-divisible-by 128
  --attention-dropout 0.0
  --hidden-dropout 0.0
)

# The plan.
PARALLEL_ARGS=(
  --tensor-model-parallel-size 8
  --pipeline-model-parallel-size 8
  --context-parallel-size 1
  --overlap-grad-reduce
)

# Batch, precision, recompute, optimizer.
TRAINING_ARGS=(
  --micro-batch-size 1
  --global-batch-size 1536
  --seq-length 2048
  --fp16
  --recompute-granularity full
  --recompute-method uniform
  --recompute-num-layers 1
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
  --vocab-size 50256
  --mock-data
  --split '99,1,0'
)
