#!/usr/bin/env bash
# Every GPU check on one machine with a GPU: bash benchmarks/gpu.sh [OUT [CHECK...]]
# Ends within ten minutes (BUDGET seconds, 580): each check has a limit of its own, those that matter
# most come first, and those for which no time is left are named, to be given as CHECKs
# (titles, such as "exact neighbors") in another call.
# Needs torch with CUDA and triton, our package's dependencies, pytest and open_clip_torch (--no-deps,
# with torchvision, webdataset 0.2.86, braceexpand and pandas for its training; PEER_PYTHON and
# PEER_PATH say where that is, if elsewhere).
# A check that fails does not keep the others from running; the status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
shift || true
wanted=("$@")
python=${PYTHON:-python3}
for p in shards ingest filter pixels train eval; do export PYTHONPATH=packages/$p/src:${PYTHONPATH:-}; done
mkdir -p "$out"
name="gpu-$(date -u +%F)"
budget=${BUDGET:-580} began=$SECONDS
status=0 known="|"
check() { # a title, a limit in seconds, and a command
  local title=$1 limit=$2
  shift 2
  known+="$title|"
  if ((${#wanted[@]})) && ! printf '%s\n' "${wanted[@]}" | grep -Fqx -- "$title"; then return; fi
  local left=$((budget - SECONDS + began))
  if ((left < 30)); then
    echo "-- $title: no time left"
    status=1
    return
  fi
  echo "== $title"
  timeout "$((limit < left ? limit : left))" "$@" || { echo "-- $title: status $?"; status=1; }
}
{
  date -u +%FT%TZ
  git rev-parse HEAD 2>/dev/null || true
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$python" -c 'import torch; print("torch", torch.__version__)'
  check "parity" 120 "$python" benchmarks/parity.py --device cuda --json "$out/$name-parity.json"
  check "kernels" 90 "$python" -m pytest -q -p no:cacheprovider tests/train/test_tokenwise_triton.py
  check "loader to step" 300 "$python" benchmarks/end_to_end.py --device cuda --batch 1024 \
    --steps 60 --peer-path "${PEER_PATH:-}" ${PEER_PYTHON:+--peer-python "$PEER_PYTHON"} \
    --json "$out/$name-end-to-end.json"
  check "exact neighbors" 120 "$python" benchmarks/knn_gpu.py --json "$out/$name-knn.json"
  check "losses" 200 "$python" benchmarks/losses.py --device cuda --rounds 1 \
    --min-batch 4096 --max-batch 32768 --json "$out/$name-losses.json"
  check "step, fp32" 120 "$python" benchmarks/step.py --device cuda --batch 256 --rounds 5
  check "step, bf16" 120 "$python" benchmarks/step.py --device cuda --batch 1024 --rounds 10 \
    --precision amp_bf16 --methods clip slip filip declip defilip --json "$out/$name-step.json"
  check "step, bf16, compiled" 150 "$python" benchmarks/step.py --device cuda --batch 1024 \
    --rounds 10 --precision amp_bf16 --compile --json "$out/$name-step-compiled.json"
  check "views on the device" 60 "$python" -m pytest -q -p no:cacheprovider \
    tests/train/test_device_views.py tests/train/test_device_feed.py
  check "probe" 150 "$python" benchmarks/probe.py --device cuda --rows 20000 --classes 10 \
    --json "$out/$name-probe.json"
  check "DeepSpeed" 120 "$python" benchmarks/deepspeed_overhead.py --device cuda --ranks 1 \
    --model ViT-B-32 --batch 1024 --precision amp_bf16 --steps 3 --rounds 5
  for one in "${wanted[@]}"; do
    case $known in *"|$one|"*) ;; *) echo "-- there is no check '$one'"; status=1 ;; esac
  done
  exit "$status"
} 2>&1 | tee -a "$out/$name.txt"
exit "${PIPESTATUS[0]}"
