#!/usr/bin/env bash
# Every GPU check, in under ten minutes, on one machine with a GPU: bash benchmarks/gpu.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
for p in shards ingest filter train eval; do export PYTHONPATH=packages/$p/src:${PYTHONPATH:-}; done
mkdir -p "$out"
file="$out/gpu-$(date +%F).txt"
{
  date -u +%FT%TZ
  git rev-parse HEAD 2>/dev/null || true
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$python" -c 'import torch; print("torch", torch.__version__)'
  for precision in fp32 amp_bf16; do
    "$python" benchmarks/step.py --model ViT-B-32 --batch 512 --device cuda --precision "$precision"
  done
} 2>&1 | tee "$file"
