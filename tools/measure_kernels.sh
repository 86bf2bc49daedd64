#!/usr/bin/env bash
# What a machine with a CUDA GPU says about the attention kernels: are they right, how fast are they, which tiling is fastest.
# About eight minutes. Usage: tools/measure_kernels.sh FOLDER    (text and JSON are written there)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?name a folder for the results}
mkdir -p "$out"
python=${PYTHON:-python3}
unset TRITON_INTERPRET # compiled, not interpreted

status=0
"$python" -m pytest -q -rs -m gpu tests/kernels tests/contracts/test_attention.py 2>&1 | tee "$out/tests.txt" || status=$?
"$python" -m pagebrain bench kernels --json "$out/kernels.json" 2>&1 | tee "$out/kernels.txt" || status=$?
"$python" -m tools.tune_kernels --batch 1,64,256 --context 512,960 --replays 10 --json "$out/tuning.json" 2>&1 |
    tee "$out/tuning.txt" || status=$?
exit "$status"
