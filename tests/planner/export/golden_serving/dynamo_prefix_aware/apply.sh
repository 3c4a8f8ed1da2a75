#!/usr/bin/env bash
# Meshwright: llama-3-8b on Dynamo 1.6, v1alpha1.
# Run once, where kubectl reaches a cluster with the controller of the manifest; further arguments go to kubectl apply.
# Folders and files that you name are those inside the image.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${IMAGE:?set IMAGE to the image of the Dynamo 1.6 runtime for sglang}"
: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

if ! [[ "$IMAGE" =~ ^[A-Za-z0-9/][A-Za-z0-9._:/@-]*$ ]]; then
  echo "apply.sh: IMAGE $IMAGE holds more than letters, digits and ._:/@-" >&2
  exit 2
fi
if ! [[ "$MODEL" =~ ^[A-Za-z0-9/][A-Za-z0-9._:/@-]*$ ]]; then
  echo "apply.sh: MODEL $MODEL holds more than letters, digits and ._:/@-" >&2
  exit 2
fi

MANIFEST="$(<"$EXPORT_DIR/dynamo.yaml")"
MANIFEST="${MANIFEST//MESHWRIGHT_IMAGE/$IMAGE}"
MANIFEST="${MANIFEST//MESHWRIGHT_MODEL/$MODEL}"
printf '%s\n' "$MANIFEST" | kubectl apply "$@" --filename=-
