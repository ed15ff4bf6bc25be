#!/usr/bin/env bash
# Every GPU check, in under ten minutes, on one machine with a GPU: bash benchmarks/gpu.sh [OUT]
# Needs torch with CUDA and triton, our package's dependencies, and open_clip_torch (--no-deps).
# A check that fails does not keep the others from running; the status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
for p in shards ingest filter pixels train eval; do export PYTHONPATH=packages/$p/src:${PYTHONPATH:-}; done
mkdir -p "$out"
name="gpu-$(date -u +%F)"
status=0
check() { # a title, a limit in seconds, and a command
  local title=$1 limit=$2
  shift 2
  echo "== $title"
  timeout "$limit" "$@" || { echo "-- $title: status $?"; status=1; }
}
{
  date -u +%FT%TZ
  git rev-parse HEAD 2>/dev/null || true
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$python" -c 'import torch; print("torch", torch.__version__)'
  check "parity" 120 "$python" benchmarks/parity.py --device cuda --json "$out/$name-parity.json"
  check "kernels" 90 "$python" -m pytest -q -p no:cacheprovider tests/train/test_tokenwise_triton.py
  check "losses" 150 "$python" benchmarks/losses.py --device cuda --json "$out/$name-losses.json"
  check "step, fp32" 60 "$python" benchmarks/step.py --device cuda --batch 256 --rounds 5
  check "step, bf16" 60 "$python" benchmarks/step.py --device cuda --batch 1024 --rounds 10 \
    --precision amp_bf16 --methods clip slip filip declip defilip --json "$out/$name-step.json"
  check "step, bf16, compiled" 150 "$python" benchmarks/step.py --device cuda --batch 1024 \
    --rounds 10 --precision amp_bf16 --compile --json "$out/$name-step-compiled.json"
  check "exact neighbors" 120 "$python" benchmarks/knn_gpu.py --json "$out/$name-knn.json"
  check "views on the device" 60 "$python" -m pytest -q -p no:cacheprovider \
    tests/train/test_device_views.py tests/train/test_device_feed.py
  check "loader to step" 200 "$python" benchmarks/end_to_end.py --device cuda --batch 1024 \
    --steps 60 --json "$out/$name-end-to-end.json"
  check "probe" 150 "$python" benchmarks/probe.py --device cuda --rows 20000 --classes 10 \
    --json "$out/$name-probe.json"
  check "DeepSpeed" 60 "$python" benchmarks/deepspeed_overhead.py --ranks 1 --model ViT-B-32
  exit "$status"
} 2>&1 | tee "$out/$name.txt"
exit "${PIPESTATUS[0]}"
