"""Greedy answers of the reference model on two tensor-parallel ranks.

A process of its own: how to bind ranks to cores is read once per process. Usage:
generate_sharded.py PACK REFUSED_PACK QUESTIONS TOKENS; the last line of its output is JSON:

    refused    what is raised for REFUSED_PACK, type and message
    token_ids  of the answers to the first QUESTIONS held-out questions
    logprobs   of these tokens
    caches     what each rank's caches take, see `worker_extension.Inspection.measured_cache`
"""

import json
import os
import sys
from typing import Any

from tests.support.engines import compacted
from tests.support.reference import MODEL, questions

#: Alike on one rank and on two. In float32 the order in which ranks add up decides no answer.
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 16 << 20,
    "max_model_len": 1024,
    "seed": 0,
}
#: Prompts, too, are read from codes.
SECTION: dict[str, Any] = {"exact_prefill": False}


def sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=1)


def chosen_logprobs(output: Any) -> list[float]:
    completion = output.outputs[0]
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [seen[token].logprob for token, seen in pairs]


def main(pack: str, refused_pack: str, count: str, tokens: str) -> dict[str, Any]:
    from vllm import LLM

    arguments = {
        **ARGUMENTS,
        "model": str(MODEL),
        "tensor_parallel_size": 2,
        "mm_encoder_tp_mode": "data",  # the vision tower has three heads
        "worker_extension_cls": "tests.support.worker_extension.Inspection",
    }
    try:
        LLM(**arguments, **compacted(refused_pack, **SECTION))
        refused = "nothing"
    except ValueError as error:
        refused = f"{type(error).__name__}: {error}"
    llm = LLM(**arguments, **compacted(pack, **SECTION))
    prompts = [question.prompt for question in questions(llm)[: int(count)]]
    outputs = llm.generate(prompts, sampling(int(tokens)), use_tqdm=False)
    return {
        "refused": refused,
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [chosen_logprobs(output) for output in outputs],
        "caches": llm.collective_rpc("measured_cache"),
    }


if __name__ == "__main__":
    # Without it vLLM wants a NUMA node for each rank.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    print(json.dumps(main(*sys.argv[1:])))
