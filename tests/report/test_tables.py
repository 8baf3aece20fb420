"""What people look at says what was measured."""

from pathlib import Path

import pytest
from rich.console import Console

from vllm_attentionpack.codec.layout import GroupLayout, PlaneCounts
from vllm_attentionpack.evaluate.compare import Comparison
from vllm_attentionpack.evaluate.run import Evaluation
from vllm_attentionpack.packfile.schema import (
    Fingerprint,
    GroupHeader,
    LayerHeader,
    PackHeader,
    Provenance,
)
from vllm_attentionpack.report.evaluation import evaluation_table
from vllm_attentionpack.report.inspect import pack_facts, pack_tables
from vllm_attentionpack.report.machine import describe_machine
from vllm_attentionpack.report.markdown import with_figures

ROOT = Path(__file__).parents[2]
ROW = Comparison(
    kl=0.01234,
    top1_agreement=0.987,
    ppl_dense=2.5,
    ppl=2.75,
    accuracy_dense=0.9,
    accuracy=0.8,
    answer_agreement=0.85,
    n=40,
    tokens=400,
)


def test_evaluation_table_shows_every_figure_in_a_narrow_terminal():
    evaluation = Evaluation(
        overall=ROW,
        groups={"kind=text": ROW.model_copy(update={"accuracy": None})},
        ratio=7.9,
        bytes_per_token={"dense": 2048, "packed": 259},
        kv_tokens={"dense": 1000, "packed": 7900},
    )
    console = Console(width=80, record=True)
    console.print(evaluation_table(evaluation))
    shown = console.export_text()
    for figure in ("7.90x", "2,048", "259", "7,900", "0.0123", "98.7%", "2.750", "2.500", "80.0%"):
        assert figure in shown, figure
    assert "…" not in shown
    assert "text" in shown and "kind=" not in shown


def test_names_in_brackets_are_shown():
    """Rich would take them for markup: drop them, or fail on a closing one."""
    evaluation = Evaluation(
        overall=ROW,
        groups={"kind=[text]": ROW, "kind=[/b]": ROW},
        ratio=7.9,
        bytes_per_token={"dense": 2048, "packed": 259},
        kv_tokens={"dense": 1000, "packed": 7900},
    )
    console = Console(width=80, record=True)
    console.print(evaluation_table(evaluation))
    console.print(pack_tables(wide_header("/models/[new]/a[/b]")))
    shown = console.export_text()
    for name in ("[text]", "[/b] ", "/models/[new]/a[/b]"):
        assert name in shown


def test_pack_tables_show_every_figure_in_a_narrow_terminal():
    console = Console(width=80, record=True)
    console.print(pack_tables(wide_header("model")))
    shown = console.export_text()
    assert "…" not in shown
    for cell in ("848/1024", "16/32/80/496/224", "832/1024", "0/0/64/512/256"):
        assert cell in shown.split()


def test_joint_keys_and_values_have_one_line():
    facts = pack_facts(wide_header("model", joint_kv=True))
    group = facts["layers"][0]["groups"][0]
    assert group["joint_kv"] and group["key"] == group["value"]
    assert group["key"]["dims"] == 2048
    console = Console(width=80, record=True)
    console.print(pack_tables(wide_header("model", joint_kv=True)))
    shown = console.export_text().split()
    assert "KV" in shown and "joint" in shown and "848/2048" in shown
    assert not {"K", "V"} & set(shown)


def wide_header(model: str, joint_kv: bool = False) -> PackHeader:
    """Of a model with eight KV heads of 128 dims, all in one group."""
    fingerprint = Fingerprint(
        architecture="TestForCausalLM",
        num_layers=1,
        num_query_heads=32,
        num_kv_heads=8,
        head_size=128,
        rope="{}",
    )
    key, value = (
        PlaneCounts(n8=128, n4=512, n2=256, n12=16, n10=32),
        PlaneCounts(n8=64, n4=512, n2=256),
    )
    group = GroupHeader.of(GroupLayout(key, key if joint_kv else value, joint_kv))
    return PackHeader(
        format_version=1,
        fingerprint=fingerprint,
        provenance=Provenance(
            model=model,
            data_sha256="0" * 64,
            tokens=1,
            visual_tokens=0,
            seed=0,
            vllm_version="0",
            attentionpack_version="0",
        ),
        heads_per_group=8,
        num_modalities=1,
        ratio=4,
        max_context=2048,
        sinks=4,
        window=64,
        layers=(LayerHeader(name="a", bytes_per_token=1100, groups=(group,)),),
    )


@pytest.mark.parametrize("name", ["README.md", "docs/quality.md", "docs/window.md"])
def test_figures_of_documents_are_those_of_the_result_files(name):
    text = (ROOT / name).read_text()
    assert "<!-- figures: reference_vlm_" in text
    assert with_figures(text, ROOT / "docs" / "results") == text


def test_machine_is_described():
    facts = describe_machine()
    assert facts["cpu"] and facts["torch"] and facts["vllm"].startswith("0.3")
