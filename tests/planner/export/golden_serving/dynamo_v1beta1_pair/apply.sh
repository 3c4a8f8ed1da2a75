#!/usr/bin/env bash
# Meshwright: deepseek-v3 on Dynamo 1.6, v1beta1.
# Run once, where kubectl reaches a cluster with the controller of the manifest; further arguments go to kubectl apply.
# Folders and files that you name are those inside the image.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${IMAGE:?set IMAGE to the image of the Dynamo 1.6 runtime for trtllm}"
: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

if ! [[ "$IMAGE" =~ ^[A-Za-z0-9/][A-Za-z0-9._:/@-]*$ ]]; then
  echo "apply.sh: IMAGE $IMAGE holds more than letters, digits and ._:/@-" >&2
  exit 2
fi
if ! [[ "$MODEL" =~ ^[A-Za-z0-9/][A-Za-z0-9._:/@-]*$ ]]; then
  echo "apply.sh: MODEL $MODEL holds more than letters, digits and ._:/@-" >&2
  exit 2
fi

create_config_map() { # name, count of the words that follow, these words, arguments of kubectl apply
  local name="$1" count="$2"
  shift 2
  kubectl create configmap "$name" "${@:1:count}" --dry-run=client --output=yaml |
    kubectl apply "${@:count+1}" --filename=-
}

FILES=(
  --from-file="$EXPORT_DIR/prefill.yaml"
  --from-file="$EXPORT_DIR/decode.yaml"
)
create_config_map meshwright-deepseek-v3-files "${#FILES[@]}" "${FILES[@]}" "$@"

MANIFEST="$(<"$EXPORT_DIR/dynamo.yaml")"
MANIFEST="${MANIFEST//MESHWRIGHT_IMAGE/$IMAGE}"
MANIFEST="${MANIFEST//MESHWRIGHT_MODEL/$MODEL}"
printf '%s\n' "$MANIFEST" | kubectl apply "$@" --filename=-
