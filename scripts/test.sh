#!/usr/bin/env bash
# All checks: style, types, quick tests, tests that start vLLM engines or fresh processes.
#
#   scripts/test.sh [--fast] [pytest arguments]      --fast leaves the last kind out
#   scripts/test.sh --sanitize [pytest arguments]    only the tests of the CPU kernels, in a build
#                                                    with address and undefined-behaviour checks
#
# Every phase runs whatever became of the one before it; the exit status is 0 only if all passed. A
# pytest phase that collects no test has failed.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

# Threads that wait by spinning take the cores from other test processes, up to twenty times as long.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-0}"

fast=false
sanitize=false
pytest_args=()
for argument in "$@"; do
    case $argument in
    --fast) fast=true ;;
    --sanitize) sanitize=true ;;
    *) pytest_args+=("$argument") ;;
    esac
done

bin=.venv/bin
sources=(vllm_attentionpack tests scripts)
summary=()
failures=0

phase() {
    local name=$1 start=$SECONDS result=passed status=0
    shift
    printf '\n== %s\n' "$name"
    "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        result="FAILED (exit status $status)"
        failures=$((failures + 1))
    fi
    summary+=("phase $name: $result in $((SECONDS - start)) s")
    echo "${summary[-1]}"
}

finish() {
    printf '\n== summary\n'
    printf '%s\n' "${summary[@]}"
    [ "$failures" -eq 0 ]
    exit
}

# A build beside the installed one, which the tests are pointed at. The sanitizers must be loaded
# before Python, whose own leaks are not our business.
run_sanitized() {
    local folder=build/sanitize library
    ATTENTIONPACK_CFLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
        "$bin/python" setup.py -q build_ext --build-lib "$folder" --build-temp "$folder/temp"
    library=$(find "$PWD/$folder" -name '_kernels*.so')
    [ -n "$library" ] || return 1
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0 ATTENTIONPACK_CPU_LIBRARY=$library \
        "$bin/python" -m pytest tests/ops/test_cpu*.py tests/ops/test_exact.py tests/ops/test_spans.py \
        "${pytest_args[@]}"
}

if $sanitize; then
    phase "sanitizers" run_sanitized
    finish
fi
phase "ruff check" "$bin/ruff" check "${sources[@]}"
phase "ruff format" "$bin/ruff" format --check "${sources[@]}"
phase "mypy" "$bin/mypy"
phase "quick tests" \
    "$bin/python" -m pytest -m "not engine and not slow and not gpu" "${pytest_args[@]}"
# The variable counts when Triton is imported: these tests need a process of their own.
phase "GPU kernels in the interpreter" env TRITON_INTERPRET=1 "$bin/python" -m pytest -n 2 \
    tests/ops/triton
if ! $fast; then
    # Two at a time: each engine keeps one core busy. Files stay whole, since they share engines.
    phase "engine and slow tests" "$bin/python" -m pytest -n 2 --dist loadfile \
        -m "(engine or slow) and not gpu" "${pytest_args[@]}"
fi

finish
