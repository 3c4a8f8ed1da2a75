#!/usr/bin/env bash
# Meshwright: vllm-router 0.1.17 in front of the replicas.
# Run once, where every replica can be reached.
set -euo pipefail

: "${REPLICA_URLS:?set REPLICA_URLS to the URLs of the aggregated replicas in their order, separated by spaces}"

PORT="${PORT:-8080}"
URL_ARGS=()

read -r -a URLS <<<"$REPLICA_URLS"
if [[ "${#URLS[@]}" -ne 4 ]]; then
  echo "router.sh: the plan has 4 in the aggregated pool, but REPLICA_URLS names ${#URLS[@]}" >&2
  exit 2
fi
URL_ARGS+=(--worker-urls "${URLS[@]}")

exec vllm-router \
  --host 0.0.0.0 --port "$PORT" \
  --policy cache_aware \
  "${URL_ARGS[@]}" \
  "$@"
