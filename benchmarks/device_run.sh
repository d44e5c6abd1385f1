#!/usr/bin/env bash
# Everything that needs a GPU, in two calls that fit fifteen minutes together: the stages of benchmarks/device/run.py.
#
#   OUT=results bash benchmarks/device_run.sh first  [--minutes 5.5]    # right or wrong, and our own times
#   OUT=results bash benchmarks/device_run.sh second [--minutes 6.5]    # other people's times, sanitizers, profiler
#   OUT=results bash benchmarks/device_run.sh STAGE ...                 # what a call left over
#
# Needs torch >= 2.10 with CUDA and Python >= 3.10; no network.  The library is used where it loads (carry
# consistency_ops/_C.abi3.so and build/device/golden, which `make device` compiles), else built there with the toolkit.
# At most eight files are left in $OUT (default: build/device): results.jsonl grows line by line, logs.tar.gz has the
# logs, attestation.json says what ran.
# Tier C of the benchmarks wants nvidia-libmathdx-cu13, on Python's path, in $MATHDX_ROOT, or here after
# "pip install --no-deps --target build/mathdx nvidia-libmathdx-cu13"; without it there is none.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT="${OUT:-$PWD/build/device}" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if [ -z "${MATHDX_ROOT:-}" ] && [ -d build/mathdx/nvidia/cu13 ]; then export MATHDX_ROOT="$PWD/build/mathdx/nvidia/cu13"; fi
mkdir -p "$OUT"
exec "${PYTHON:-python3}" -m benchmarks.device.run "$@"
