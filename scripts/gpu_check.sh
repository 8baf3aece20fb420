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
# One process per engine, whose errors are then seen; the sampler of FlashInfer wants a compiler.
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_USE_FLASHINFER_SAMPLER=0
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then export TRITON_INTERPRET=1; fi
done
mkdir -p "$out"
status=0
engine="engine part skipped: no vLLM, no GPU, or a dry run"
# Both parts keep to their budgets and report what they have by then; `timeout` is for what hangs.
budget=460
if [ -z "${TRITON_INTERPRET:-}" ] &&
    "$python" -c 'import torch; assert torch.cuda.is_available(); import vllm' 2>/dev/null; then
    # First, since it shares the nine minutes; its own lines come last.
    engine=$(timeout --kill-after=5 220 "$python" -m vllm_attentionpack.bench.gpu_engine --out "$out" \
        --budget 205 2>"$out/gpu_engine.log" | tail -n 14) ||
        engine+=$'\n'"engine part failed: see $out/gpu_engine.log"
    budget=220
fi
timeout --kill-after=5 $((budget + 60)) \
    "$python" -m vllm_attentionpack.bench.gpu_check --out "$out" --budget "$budget" "$@" || status=$?
printf '%s\n' "$engine"
exit "$status"
