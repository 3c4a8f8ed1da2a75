#!/usr/bin/env bash
# Meshwright: the server in front of the prefill and decode replicas, TensorRT-LLM 1.2.
# Run once, where every replica can be reached.
set -euo pipefail

: "${PREFILL_URLS:?set PREFILL_URLS to the host:port of the prefill replicas, separated by spaces}"
: "${DECODE_URLS:?set DECODE_URLS to the host:port of the decode replicas, separated by spaces}"

PORT="${PORT:-8080}"
if ! [[ "$PORT" =~ ^[0-9]{1,5}$ ]]; then
  echo "router.sh: PORT $PORT is not a port" >&2
  exit 2
fi
CONFIG="$(mktemp)"
trap 'rm -f -- "$CONFIG"' EXIT

list_servers() { # name of the section, replicas of the plan, name of the variable, its words
  local section="$1" count="$2" variable="$3" url
  shift 3
  if [[ "$#" -ne "$count" ]]; then
    echo "router.sh: the plan has $count $section, but $variable names $#" >&2
    exit 2
  fi
  printf '%s:\n  num_instances: %s\n  router:\n    type: load_balancing\n  urls:\n' "$section" "$count"
  for url in "$@"; do
    if ! [[ "$url" =~ ^[A-Za-z0-9._-]+:[0-9]{1,5}$ ]]; then
      echo "router.sh: $url in $variable is not host:port" >&2
      exit 2
    fi
    printf '    - "%s"\n' "$url"
  done
}

read -r -a PREFILL <<<"$PREFILL_URLS"
read -r -a DECODE <<<"$DECODE_URLS"
{
  printf 'hostname: 0.0.0.0\nport: %s\nbackend: pytorch\n' "$PORT"
  list_servers context_servers 2 PREFILL_URLS "${PREFILL[@]}"
  list_servers generation_servers 1 DECODE_URLS "${DECODE[@]}"
} >"$CONFIG"

trtllm-serve disaggregated -c "$CONFIG" "$@"
