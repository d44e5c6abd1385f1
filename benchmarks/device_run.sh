#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, tests, sanitizers, golden vectors, benchmarks, attestation.
#
#   OUT=results bash benchmarks/device_run.sh [--minutes 9.5] [STAGE ...]
#
# Needs torch >= 2.10 with CUDA, its CUDA toolkit and Python >= 3.10; no network.  Stages (benchmarks/device/run.py)
# are time-boxed, a failed one does not stop the next, and each leaves a log and JSON in $OUT (default: build/device).
# A call that runs out of minutes says which stages are left; a second call with their names does them.
# Tier C of the benchmarks wants nvidia-libmathdx-cu13, on Python's path, in $MATHDX_ROOT, or here after
# "pip install --no-deps --target build/mathdx nvidia-libmathdx-cu13"; without it a line says so.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT="${OUT:-$PWD/build/device}" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if [ -z "${MATHDX_ROOT:-}" ] && [ -d build/mathdx/nvidia/cu13 ]; then export MATHDX_ROOT="$PWD/build/mathdx/nvidia/cu13"; fi
mkdir -p "$OUT"
exec "${PYTHON:-python3}" -m benchmarks.device.run "$@"
