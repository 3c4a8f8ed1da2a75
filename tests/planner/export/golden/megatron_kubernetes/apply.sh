#!/usr/bin/env bash
# Meshwright: llama-3-8b on 16 GPUs, Megatron-LM core_r0.16.
# Run once, where kubectl reaches a cluster with the controller of the manifest; further arguments go to kubectl apply.
# Folders and files that you name are those inside the image.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${IMAGE:?set IMAGE to the container image with the framework and all that the variables below name}"
: "${MEGATRON_PATH:?set MEGATRON_PATH to a Megatron-LM checkout (core_r0.16)}"

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
  --from-file="$EXPORT_DIR/env.sh"
  --from-file="$EXPORT_DIR/args.sh"
  --from-file="$EXPORT_DIR/launch.sh"
)
create_config_map meshwright-llama-3-8b-files "${#FILES[@]}" "${FILES[@]}" "$@"

SETTINGS=(
  --from-literal="MEGATRON_PATH=$MEGATRON_PATH"
)
create_config_map meshwright-llama-3-8b-settings "${#SETTINGS[@]}" "${SETTINGS[@]}" "$@"

MANIFEST="$(<"$EXPORT_DIR/leaderworkerset.yaml")"
MANIFEST="${MANIFEST//MESHWRIGHT_IMAGE/$IMAGE}"
printf '%s\n' "$MANIFEST" | kubectl apply "$@" --filename=-
