"""What an engine derives from its configuration and its pack."""

from types import SimpleNamespace

from vllm_attentionpack.attention.state import EngineState
from vllm_attentionpack.config import ServeConfig


def test_no_more_tokens_stay_exact_than_a_request_has():
    """Room for them is made in advance, for every request."""
    header = SimpleNamespace(sinks=4, window=9**9)
    state = SimpleNamespace(
        config=ServeConfig(pack="p"), pack=SimpleNamespace(header=header), max_model_len=2048
    )
    assert (EngineState.sinks.fget(state), EngineState.window.fget(state)) == (4, 2048)
