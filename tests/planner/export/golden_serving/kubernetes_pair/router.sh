#!/usr/bin/env bash
# Meshwright: sglang-router 0.3.2 in front of the replicas.
# Run once, where every replica can be reached.
set -euo pipefail

: "${PREFILL_URLS:?set PREFILL_URLS to the URLs of the prefill replicas in their order, separated by spaces}"
: "${DECODE_URLS:?set DECODE_URLS to the URLs of the decode replicas in their order, separated by spaces}"

PORT="${PORT:-8080}"
URL_ARGS=()

read -r -a URLS <<<"$PREFILL_URLS"
if [[ "${#URLS[@]}" -ne 2 ]]; then
  echo "router.sh: the plan has 2 in the prefill pool, but PREFILL_URLS names ${#URLS[@]}" >&2
  exit 2
fi
for index in "${!URLS[@]}"; do
  url="${URLS[index]}"
  URL_ARGS+=(--prefill "$url" "${BOOTSTRAP_PORT:-$((8998 + index))}")
done

read -r -a URLS <<<"$DECODE_URLS"
if [[ "${#URLS[@]}" -ne 1 ]]; then
  echo "router.sh: the plan has 1 in the decode pool, but DECODE_URLS names ${#URLS[@]}" >&2
  exit 2
fi
for index in "${!URLS[@]}"; do
  url="${URLS[index]}"
  URL_ARGS+=(--decode "$url")
done

exec python3 -m sglang_router.launch_router \
  --host 0.0.0.0 --port "$PORT" \
  --policy power_of_two \
  --pd-disaggregation \
  "${URL_ARGS[@]}" \
  "$@"
