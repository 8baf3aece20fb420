#!/usr/bin/env bash
# Check and measure the GPU kernels: under nine minutes; the last lines are a short table.
#
#   scripts/gpu_check.sh              on a GPU; full results in ${OUT:-docs/results}/gpu_check.json
#   scripts/gpu_check.sh --dry-run    the same path with tiny shapes in Triton's interpreter, no GPU
#
# Needs Python 3.10 or later with torch 2.11 or later, Triton 3.6 or later and numpy. vLLM is used
# where it can be imported: its attention is measured beside ours, and then the engine. PYTHON names
# the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-docs/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then export TRITON_INTERPRET=1; fi
done
mkdir -p "$out"
status=0
engine=""
if [ -z "${TRITON_INTERPRET:-}" ] && "$python" -c 'import vllm' 2>/dev/null; then
    # First, since it shares the nine minutes; its own lines come last.
    engine=$(timeout 240 "$python" -m vllm_attentionpack.bench.gpu_engine --out "$out" \
        2>"$out/gpu_engine.log" | tail -n 12) || engine="engine part failed: see $out/gpu_engine.log"
    budget=270
else
    engine="engine part skipped: vLLM cannot be imported, or this is a dry run"
    budget=480
fi
"$python" -m vllm_attentionpack.bench.gpu_check --out "$out" --budget "$budget" "$@" || status=$?
printf '%s\n' "$engine"
exit "$status"
