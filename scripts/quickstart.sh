#!/usr/bin/env bash
# Set up .venv where needed, then run the quickstart: calibrate, serve and compare on this machine.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
exec .venv/bin/python -m vllm_attentionpack.quickstart "$@"
