"""Serves a few prompts on the reference model and compares positions told with positions used.

Run as a script; the last line of its output is one JSON object:

    v2         whether the newer model runner served
    dummies    what builders were told in warm-up, and in a dummy step before and after the others
    steps      requests of each step
    compared   positions told that the model used, over all steps
    moved      those among them that are not the token's index
    decoded    those among them that belong to generated tokens
    wrong      at most ten that differ: [step, request, token, told, used]
    told_late  whether anything is told when no metadata is built
"""

import json
import os
from collections.abc import Callable
from typing import Any

from tests.plugin.watch_engine import ENGINE, allow_second_runner, chats

STRIDE, COUNT = 3, 40


class Watch:
    """What builders were told, and what the model then used.

    Attributes:
        told: of every build of metadata, `[requests][COUNT]` or None.
        steps: of every build that was told something, where its requests begin (`starts`), how
            long they are (`lengths`), their `names`, and the positions of its tokens (`used`).
    """

    def __init__(self) -> None:
        self.told: list[list[list[int]] | None] = []
        self.steps: list[dict[str, Any]] = []

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        from vllm_attentionpack.compat import positions_every

        def build(builder: Any, prefix: int, common: Any, *args: Any, **kwargs: Any) -> Any:
            asked = (STRIDE, COUNT, common.num_reqs, common.seq_lens.device)
            told = positions_every(*asked)
            assert told is positions_every(*asked), "the next group's builder sees the same"
            self.told.append(None if told is None else told.tolist())
            if told is not None:
                starts, lengths = common.query_start_loc.tolist(), common.seq_lens.tolist()
                self.steps.append({"starts": starts, "lengths": lengths})
            return original(builder, prefix, common, *args, **kwargs)

        return build

    def rotate(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the rotary embedding, which all layers share."""
        positions = args[0] if args else kwargs["positions"]
        self.steps[-1].setdefault("used", positions[0].tolist())

    def execute(self, runner: Any) -> Callable[..., Any]:
        original = runner.execute_model

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if state := runner.execute_model_state:
                batch = getattr(runner, "input_batch", None) or state.input_batch
                # Not those of a dummy step after it.
                self.steps[-1].setdefault("names", list(batch.req_ids))
            return result

        return execute_model


def main() -> dict[str, Any]:
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        allow_second_runner()
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    from vllm_attentionpack.compat import rope_positions
    from vllm_attentionpack.compat.wrap import wrap_method

    def choose(original: Any) -> Any:
        def get_attn_backend_cls(cls: type, *args: Any, **kwargs: Any) -> str:
            rope_positions.install()  # where `selection` installs hooks on the model's side
            return original(cls, *args, **kwargs)

        return get_attn_backend_cls

    watch = Watch()
    wrap_method(type(current_platform), "get_attn_backend_cls", choose)
    wrap_method(CPUAttentionMetadataBuilder, "build", watch.build)
    llm = LLM(
        **ENGINE,
    )
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    idle = {"force_attention": True} if hasattr(runner, "input_batch") else {}
    runner._dummy_run(4, **idle)
    dummies = watch.told[:]
    watch.told.clear()
    assert not watch.steps
    runner.execute_model = watch.execute(runner)

    def hook(model: Any) -> None:
        rotary = model.language_model.model.layers[0].self_attn.rotary_emb
        rotary.register_forward_pre_hook(watch.rotate, with_kwargs=True)

    llm.apply_model(hook)

    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    outputs = llm.chat(chats(), sampling, use_tqdm=False)
    # As an idle data-parallel rank does between steps.
    runner._dummy_run(4, **idle)
    dummies.append(watch.told.pop())
    prompts = {o.request_id: len(o.prompt_token_ids) for o in outputs}
    return {
        "v2": llm.llm_engine.vllm_config.use_v2_model_runner,
        "dummies": dummies,
        "told_late": rope_positions.positions_every(STRIDE, COUNT, 1, "cpu") is not None,
        **compare(watch, prompts),
    }


def compare(watch: Watch, prompts: dict[str, int]) -> dict[str, Any]:
    """What was told about each token that exists by then, against what the model used for it."""
    assert len(watch.told) == len(watch.steps)
    compared = moved = decoded = 0
    wrong: list[list[Any]] = []
    seen: dict[str, dict[int, int]] = {}
    for number, (told, step) in enumerate(zip(watch.told, watch.steps, strict=True)):
        assert told is not None
        starts = step["starts"]
        for row, name in enumerate(step["names"]):
            used = seen.setdefault(name, {})
            query = step["used"][starts[row] : starts[row + 1]]
            length = step["lengths"][row]
            used.update(zip(range(length - len(query), length), query, strict=True))
            for n, position in enumerate(told[row]):
                token = n * STRIDE
                if token >= length:
                    continue
                compared += 1
                moved += position != token
                decoded += token >= prompts[name.rpartition("-")[0]]
                if position != used[token]:
                    wrong.append([number, name, token, position, used[token]])
    return {
        "steps": [step["names"] for step in watch.steps],
        "compared": compared,
        "moved": moved,
        "decoded": decoded,
        "wrong": wrong[:10],
    }


if __name__ == "__main__":
    print(json.dumps(main()))
