#!/usr/bin/env bash
# Meshwright: deepseek-v3 on Kubernetes.
# Run once, where kubectl reaches a cluster with the controller of the manifest; further arguments go to kubectl apply.
# Folders and files that you name are those inside the image.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${IMAGE:?set IMAGE to the container image with sglang 0.5.23}"
: "${ROUTER_IMAGE:?set ROUTER_IMAGE to the container image with the router of sglang}"
: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

if ! [[ "$IMAGE" =~ ^[A-Za-z0-9/][A-Za-z0-9._:/@-]*$ ]]; then
  echo "apply.sh: IMAGE $IMAGE holds more than letters, digits and ._:/@-" >&2
  exit 2
fi
if ! [[ "$ROUTER_IMAGE" =~ ^[A-Za-z0-9/][A-Za-z0-9._:/@-]*$ ]]; then
  echo "apply.sh: ROUTER_IMAGE $ROUTER_IMAGE holds more than letters, digits and ._:/@-" >&2
  exit 2
fi

create_config_map() { # name, count of the words that follow, these words, arguments of kubectl apply
  local name="$1" count="$2"
  shift 2
  kubectl create configmap "$name" "${@:1:count}" --dry-run=client --output=yaml |
    kubectl apply "${@:count+1}" --filename=-
}

FILES=(
  --from-file="$EXPORT_DIR/prefill_args.sh"
  --from-file="$EXPORT_DIR/prefill.sh"
  --from-file="$EXPORT_DIR/decode_args.sh"
  --from-file="$EXPORT_DIR/decode.sh"
  --from-file="$EXPORT_DIR/router.sh"
)
create_config_map meshwright-deepseek-v3-files "${#FILES[@]}" "${FILES[@]}" "$@"

SETTINGS=(
  --from-literal="MODEL=$MODEL"
)
create_config_map meshwright-deepseek-v3-settings "${#SETTINGS[@]}" "${SETTINGS[@]}" "$@"

MANIFEST="$(<"$EXPORT_DIR/leaderworkerset.yaml")"
MANIFEST="${MANIFEST//MESHWRIGHT_IMAGE/$IMAGE}"
MANIFEST="${MANIFEST//MESHWRIGHT_ROUTER_IMAGE/$ROUTER_IMAGE}"
printf '%s\n' "$MANIFEST" | kubectl apply "$@" --filename=-
