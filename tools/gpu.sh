#!/usr/bin/env bash
# Run the tests and the benchmark for a GPU, on a machine that has torch, transformers and
# scikit-learn but no network. Missing packages come from an archive that `make gpu-packages`
# writes elsewhere. Takes less than 8 minutes.
#
#   tools/gpu.sh [--device cuda|cpu] [--fast] [--stages NAME ...] [--json PATH]
#
# PYTHON is the interpreter, and GPU_PACKAGES the archive.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
GPU_PACKAGES=${GPU_PACKAGES:-.gpu/packages.tar.xz}
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if [ -f "$GPU_PACKAGES" ]; then
	unpacked=$(mktemp -d)
	trap 'rm -rf "$unpacked"' EXIT
	"$PYTHON" -m tarfile -e "$GPU_PACKAGES" "$unpacked" || exit 1 # xz may be absent
	PYTHONPATH="$PWD:$unpacked/site"
	[ -d "$unpacked/minilm" ] && export SKLEMBED_MINILM="$unpacked/minilm"
fi

nvidia-smi || echo "no nvidia-smi"
# Other versions of the dependencies may warn, so warnings are not errors here. The slowest tests,
# of the cross-modal spaces, come late.
timeout 150 "$PYTHON" -m pytest -m gpu -W default -p no:cacheprovider \
	--continue-on-collection-errors --durations=5 \
	$(grep -l 'mark\.gpu' tests/test_*.py | sort -r)
tests=$?
timeout 320 "$PYTHON" examples/benchmarks/bench_gpu.py "$@"
benchmark=$?
echo "exit codes: tests $tests, benchmark $benchmark"
exit $((tests || benchmark))
