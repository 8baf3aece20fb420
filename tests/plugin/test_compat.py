"""Each hook does its part when our backends are selected, and nothing otherwise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_attentionpack import compat
from vllm_attentionpack.compat import features, layer_spec, modality, rope_positions, selection
from vllm_attentionpack.compat.wrap import wrap_method
from vllm_attentionpack.errors import UnsupportedModelError, UnsupportedVersionError
from vllm_attentionpack.plugin import BACKEND, STATISTICS_BACKEND, register

DEFAULT = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
OURS = "vllm_attentionpack.attention.backend.AttentionPackBackend"


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def test_wraps_each_kind_of_method_once():
    class Base:
        def plain(self, x):
            return ("plain", x)

        @classmethod
        def of_class(cls, x):
            return (cls.__name__, x)

    class Derived(Base):
        pass

    def make(original):
        return lambda owner, x: ("wrapped", *original(owner, x))

    for _ in range(2):
        wrap_method(Derived, "plain", make)
        wrap_method(Derived, "of_class", make)
    assert Derived().plain(1) == ("wrapped", "plain", 1)
    assert Derived.of_class(2) == ("wrapped", "Derived", 2)
    assert Base().plain(1) == ("plain", 1) and Base.of_class(2) == ("Base", 2)


# Features


def test_the_installed_vllm_has_all_features():
    compat.check_features()


def test_names_the_missing_features_the_working_versions_and_the_remedy(monkeypatch):
    monkeypatch.setitem(features._TO_SERVE, "Engine.flux", features._exists("vllm:Engine.flux"))
    with pytest.raises(UnsupportedVersionError) as raised:
        compat.check_features()
    message = str(raised.value)
    assert "lacks Engine.flux. " in message
    assert "works with vLLM 0.32 and 0.33" in message and "pip install" in message


@pytest.mark.parametrize(
    "probe",
    [
        features._exists("no_such_module:x"),
        features._exists("json:nothing"),
        features._takes("json:dumps", "no_such_parameter"),
        features._takes("json:__doc__", "x"),
    ],
)
def test_a_failing_probe_is_a_missing_feature(probe):
    assert features._missing({"it": probe}) == ["it"]


# Selection


def config(**changes):
    from vllm.v1.attention.selector import AttentionSelectorConfig

    return AttentionSelectorConfig(64, torch.bfloat16, "auto", 128)._replace(**changes)


def choose(name: str | None, **changes) -> str:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionBackendEnum[name] if name else None
    return current_platform.get_attn_backend_cls(backend, config(**changes), num_heads=4)


@pytest.fixture
def on_cpu():
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("these name the CPU platform's default backend")


@pytest.mark.parametrize("name", [None, "CPU_ATTN", "FLASH_ATTN", "TORCH_SDPA"])
def test_other_selections_are_the_platforms_business(name, on_cpu, monkeypatch):
    monkeypatch.setattr(selection, "check_features", lambda: pytest.fail("probed in vain"))
    monkeypatch.setattr(layer_spec, "install", lambda: pytest.fail("hooked in vain"))
    monkeypatch.setattr(modality, "install", lambda: pytest.fail("hooked in vain"))
    monkeypatch.setattr(rope_positions, "install", lambda: pytest.fail("hooked in vain"))
    assert choose(name) == DEFAULT
    assert choose(name, has_sliding_window=True, has_sink=True) == DEFAULT


def test_a_selection_is_honoured(on_cpu):
    assert choose(BACKEND) == OURS


def test_encoder_layers_keep_the_default(on_cpu):
    from vllm.v1.attention.backend import AttentionType

    for name in (BACKEND, STATISTICS_BACKEND):
        for attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
            assert choose(name, attn_type=attn_type) == DEFAULT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"has_sliding_window": True}, ["sliding window", selection.PER_KIND_OPTION]),
        ({"has_sink": True}, ["attention sinks", "another --attention-backend"]),
        ({"use_mla": True}, ["MLA", "already stores a compacted latent"]),
        ({"use_mm_prefix": True}, ["attend in both directions"]),
        ({"attn_type": "encoder_decoder"}, ["encoder_decoder", "cross-attention"]),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype", "drop --kv-cache-dtype"]),
        ({"block_size": 8}, ["block_size", "multiple of 16"]),
        ({"use_adaptive_verification": True}, ["on the host", "enable_adaptive_verification"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unsupported_layer_is_refused_with_the_remedy(changes, words):
    with pytest.raises(UnsupportedModelError) as raised:
        choose(BACKEND, **changes)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_missing_feature_is_loud_on_selection_only(monkeypatch, on_cpu):
    monkeypatch.setitem(features._TO_SERVE, "Engine.flux", features._exists("vllm:Engine.flux"))
    assert choose(None) == DEFAULT
    for name in (BACKEND, STATISTICS_BACKEND):
        with pytest.raises(UnsupportedVersionError, match=r"lacks Engine\.flux"):
            choose(name)


def test_the_statistics_backend_is_built_on_the_platforms_default(monkeypatch, on_cpu):
    from vllm_attentionpack.calibrate import backend

    monkeypatch.setattr(backend, "statistics_backend_path", lambda default: f"watched:{default}")
    assert choose(STATISTICS_BACKEND) == f"watched:{DEFAULT}"


# Specs of layers


def layer(backend):
    """What `Attention.get_kv_cache_spec` reads of a full-attention layer."""
    return SimpleNamespace(
        attn_backend=backend,
        attn_type="decoder",
        kv_cache_dtype="auto",
        kv_cache_torch_dtype=torch.bfloat16,
        sliding_window=None,
        num_kv_heads=2,
        head_size=64,
        head_size_v=64,
        layer_name="model.layers.3.attn",
    )


@pytest.fixture
def get_spec():
    from vllm.model_executor.layers.attention.attention import Attention

    layer_spec.install()
    vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=32))
    return lambda layer: Attention.get_kv_cache_spec(layer, vllm_config)


def test_a_backend_with_the_hook_sees_the_layer(get_spec):
    seen = []

    class Backend:
        @classmethod
        def customize_layer_spec(cls, layer, spec, vllm_config):
            seen.append((layer.layer_name, spec.block_size, vllm_config.cache_config.block_size))
            return "ours"

    assert get_spec(layer(Backend)) == "ours"
    assert seen == [("model.layers.3.attn", 32, 32)]


def test_a_backend_without_the_hook_gets_vllms_spec(get_spec):
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = get_spec(layer(AttentionBackend))
    assert type(spec) is FullAttentionSpec
    assert spec.page_size_bytes == 32 * 2 * (64 + 64) * 2


def test_a_layer_without_a_cache_stays_without(get_spec):
    class Backend:
        @classmethod
        def customize_layer_spec(cls, layer, spec, vllm_config):
            pytest.fail("asked for a spec that is not there")

    encoder = layer(Backend)
    encoder.attn_type = "encoder_only"
    assert get_spec(encoder) is None


# Modality

CPU = torch.device("cpu")


def feature(offset: int, length: int, is_embed: list[bool] | None = None):
    """An image that stands for `length` placeholder tokens from `offset` on."""
    from vllm.multimodal.inputs import PlaceholderRange

    mask = None if is_embed is None else torch.tensor(is_embed)
    return SimpleNamespace(
        mm_position=PlaceholderRange(offset=offset, length=length, is_embed=mask),
        identifier=f"image at {offset}",
        modality="image",
    )


def encoded(length: int) -> torch.Tensor:
    return torch.zeros(length, 8)


def gather_v1(requests, computed, scheduled, shift=0):
    """The older runner's gather, for requests given by their features."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    modality.install()
    names = [str(i) for i in range(len(requests))]
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=names),
        requests={
            name: SimpleNamespace(num_computed_tokens=done, mm_features=features)
            for name, done, features in zip(names, computed, requests, strict=True)
        },
        _get_encoder_output_from_cache=lambda name: encoded(16),
        is_multimodal_pruning_enabled=False,
        uses_mrope=False,
    )
    scheduler_output = SimpleNamespace(
        total_num_scheduled_tokens=sum(scheduled),
        num_scheduled_tokens=dict(zip(names, scheduled, strict=True)),
    )
    return GPUModelRunner._gather_mm_embeddings(runner, scheduler_output, shift)


def gather_v2(requests, computed, scheduled, shift=0):
    """The newer runner's gather, for requests given by their features."""
    from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

    modality.install()
    names = [str(i) for i in range(len(requests))]
    runner = SimpleNamespace(
        is_realtime=False,
        encoder_cache=SimpleNamespace(
            mm_features=dict(zip(names, requests, strict=True)),
            encoder_outputs={f.identifier: encoded(16) for fs in requests for f in fs},
        ),
    )
    return EncoderRunner.gather_mm_embeddings(
        runner,
        names,
        sum(scheduled),
        np.array(scheduled),
        np.cumsum([0, *scheduled]),
        np.array([100] * len(requests)),
        np.array(computed),
        shift,
    )


@pytest.fixture(params=[gather_v1, gather_v2], ids=["v1", "v2"])
def gather(request, monkeypatch):
    modality._handover.take()
    yield request.param
    modality._handover.take()


def forward(attn_metadata=True):
    """A forward context as both runners open it."""
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    modality.install()
    return set_forward_context({} if attn_metadata else None, VllmConfig(), num_tokens=None)


def visual(mask: torch.Tensor | None) -> list[int] | None:
    return None if mask is None else mask.nonzero().flatten().tolist()


def test_a_forward_sees_the_tokens_gathered_before_it(gather):
    # Tokens 2..7 of one request with an image at 4..9; 0..9 of another with one at 1..3.
    gather([[feature(4, 6)], [feature(1, 3)]], computed=[2, 0], scheduled=[6, 10])
    with forward():
        mask = compat.modality_mask(16, CPU)
        assert mask.dtype == torch.bool and mask.shape == (16,)
        assert visual(mask) == [2, 3, 4, 5, 7, 8, 9]


def test_tokens_between_the_patches_of_an_image_are_text(gather):
    gather([[feature(1, 4, [True, False, False, True])]], computed=[0], scheduled=[6])
    with forward():
        assert visual(compat.modality_mask(6, CPU)) == [1, 4]


def test_padding_is_text_and_the_mask_is_made_once(gather):
    gather([[feature(0, 3)]], computed=[0], scheduled=[3])
    with forward():
        mask = compat.modality_mask(8, CPU)
        assert visual(mask) == [0, 1, 2] and mask.shape == (8,)
        assert compat.modality_mask(8, CPU) is mask


def test_a_step_without_visual_tokens_is_text(gather):
    gather([[feature(4, 6)]], computed=[50], scheduled=[2])
    with forward():
        assert compat.modality_mask(2, CPU) is None
        assert compat.modality_mask(2, CPU) is None


def test_the_mask_serves_one_forward(gather):
    gather([[feature(0, 3)]], computed=[0], scheduled=[3])
    with forward():
        pass
    with forward():
        assert compat.modality_mask(3, CPU) is None


def test_a_later_gather_replaces_one_that_met_no_forward(gather):
    gather([[feature(0, 3)]], computed=[0], scheduled=[3])
    gather([[feature(0, 3)]], computed=[10], scheduled=[3])
    with forward():
        assert compat.modality_mask(3, CPU) is None


def test_a_context_without_attention_leaves_the_mask_to_the_forward(gather):
    gather([[feature(0, 3)]], computed=[0], scheduled=[4])
    with forward(attn_metadata=False):
        assert compat.modality_mask(4, CPU) is None
    with forward():
        assert visual(compat.modality_mask(4, CPU)) == [0, 1, 2]


def test_a_draft_model_sees_its_shifted_tokens(gather):
    gather([[feature(1, 3)]], computed=[0], scheduled=[3], shift=1)
    with forward():
        assert visual(compat.modality_mask(3, CPU)) == [0, 1, 2]


def test_a_mask_of_another_step_is_an_error(gather):
    gather([[feature(0, 3)]], computed=[0], scheduled=[8])
    with forward(), pytest.raises(AssertionError, match="8 tokens met a forward of 4"):
        compat.modality_mask(4, CPU)


def test_profiling_and_text_models_have_no_visual_tokens():
    with forward():
        assert compat.modality_mask(4, CPU) is None
    with forward(attn_metadata=False):
        assert compat.modality_mask(4, CPU) is None
    assert compat.modality_mask(4, CPU) is None


def test_the_field_of_a_patched_vllm_is_read(monkeypatch):
    context = SimpleNamespace(
        additional_kwargs={}, is_multimodal=torch.tensor([False, True, False])
    )
    monkeypatch.setattr("vllm.forward_context._forward_context", context)
    assert visual(compat.modality_mask(5, CPU)) == [1]
    context.is_multimodal, context.additional_kwargs = None, {}
    assert compat.modality_mask(5, CPU) is None
    context.is_multimodal = torch.zeros(3, dtype=torch.bool)
    context.additional_kwargs = {}
    assert compat.modality_mask(5, CPU) is None


def test_the_hook_keeps_what_the_platform_puts_into_the_context(monkeypatch):
    hook = modality._make_context(lambda cls, **kwargs: {"theirs": sorted(kwargs)})
    given = {"vllm_config": 1, "num_tokens": 2}
    theirs = {"theirs": ["attn_metadata", "num_tokens", "vllm_config"]}
    assert hook(object, attn_metadata=None, **given) == theirs
    assert hook(object, attn_metadata={}, **given) == theirs
    modality._handover.mask = mask = torch.ones(1, dtype=torch.bool)
    assert hook(object, attn_metadata={}, **given) == {**theirs, modality._MASK: mask}
