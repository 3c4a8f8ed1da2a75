#!/usr/bin/env bash
# Meshwright: sglang-router 0.3.2 in front of the replicas.
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

exec python3 -m sglang_router.launch_router \
  --host 0.0.0.0 --port "$PORT" \
  --policy round_robin \
  "${URL_ARGS[@]}" \
  "$@"
