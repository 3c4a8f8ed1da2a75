#!/usr/bin/env bash
# Meshwright: llama-3-8b on Kubernetes.
# Run once, where kubectl reaches a cluster with the controller of the manifest; further arguments go to kubectl apply.
# Folders and files that you name are those inside the image.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${IMAGE:?set IMAGE to the container image with vllm 0.33.0}"
: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

if ! [[ "$IMAGE" =~ ^[A-Za-z0-9/][A-Za-z0-9._:/@-]*$ ]]; then
  echo "apply.sh: IMAGE $IMAGE holds more than letters, digits and ._:/@-" >&2
  exit 2
fi

create_config_map() { # name, count of the words that follow, these words, arguments of kubectl apply
  local name="$1" count="$2"
  shift 2
  kubectl create configmap "$name" "${@:1:count}" --dry-run=client --output=yaml |
    kubectl apply "${@:count+1}" --filename=-
}

FILES=(
  --from-file="$EXPORT_DIR/serve_args.sh"
  --from-file="$EXPORT_DIR/serve.sh"
)
create_config_map meshwright-llama-3-8b-files "${#FILES[@]}" "${FILES[@]}" "$@"

SETTINGS=(
  --from-literal="MODEL=$MODEL"
)
create_config_map meshwright-llama-3-8b-settings "${#SETTINGS[@]}" "${SETTINGS[@]}" "$@"

MANIFEST="$(<"$EXPORT_DIR/leaderworkerset.yaml")"
MANIFEST="${MANIFEST//MESHWRIGHT_IMAGE/$IMAGE}"
printf '%s\n' "$MANIFEST" | kubectl apply "$@" --filename=-
