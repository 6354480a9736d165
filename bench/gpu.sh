#!/usr/bin/env bash
# Everything that needs a GPU, or the parts named: bash bench/gpu.sh [correct|kernels|large|small|
# latency|sides|host|sanitize ...].
# Each part stays under 8 minutes (the tests compile for most of theirs: with pytest-xdist they do so
# on every core). Results go to $OUT, or bench/results/gpu.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results/gpu}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # deterministic products, also where memory is poisoned
mkdir -p "$out"
status=0

run() { # name, seconds, command ...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  echo "$name: exit $code after $((SECONDS - start)) s"
  tail -n 3 "$out/$name.log"
  ((code == 0)) || status=1
}

workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n "$(nproc)"); fi

for part in "${@:-correct kernels large small latency sides host sanitize}"; do
  for name in $part; do
    case $name in
      correct) run correct 470 "$python" -m pytest -q --all tests/backends/test_gpu.py tests/repo/test_build.py \
        -p no:cacheprovider \
        "${workers[@]}" ;;
      large | small | latency) run "$name" 470 "$python" -m bench.run "$name" --out "$out" --seconds 400 ;;
      sides) run sides 120 "$python" -m bench.run sides --out "$out" --seconds 90 ;;
      kernels) run kernels 235 "$python" -m bench.run kernels --out "$out" --seconds 200 ;;
      host) run host 60 "$python" -m bench.host --out "$out/host.json" ;;
      sanitize)
        for tool in memcheck racecheck; do
          run "sanitize-$tool" 235 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            --kernel-regex kns=panel --kernel-regex kns=tile --kernel-regex kns=literal \
            --kernel-regex kns=row --kernel-regex kns=merge --kernel-regex kns=finish \
            --kernel-regex kns=single_kernel --kernel-regex kns=hopper \
            "$python" -m bench.sanitize
        done
        ;;
      *)
        echo "no part $name: correct, kernels, large, small, latency, sides, host, sanitize" >&2
        exit 2
        ;;
    esac
  done
done
exit $status
