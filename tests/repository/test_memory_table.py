"""The computed tables of docs/scaling.md are what their benchmark computes."""

import pytest
from paths import ROOT

from benchmarks import memory_table as script
from benchmarks.study.page_text import fill


def test_the_page_holds_the_tables(tmp_path):
    page = (ROOT / "docs" / script.PAGE).read_text(encoding="utf-8")
    copy = tmp_path / script.PAGE
    copy.write_text(page, encoding="utf-8")
    fill(copy, {"memory-table memory": script.memory_table(), "memory-table wire": script.wire_table()})
    assert copy.read_text(encoding="utf-8") == page, "run `python -m benchmarks pages`"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-405B", 405_853_388_800),
    ],
)
def test_shapes_are_the_published_ones(name, parameters):
    model = script.model_of(name, "bfloat16")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_four_bits_a_weight_and_their_scales():
    full, packed = (script.model_of("Qwen2.5-7B", held) for held in ("bfloat16", "4 bits"))
    linear = sum(p.numel() for name, p in full.named_parameters() if "proj.weight" in name)
    sizes = [
        sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
        for model in (full, packed)
    ]
    assert sizes[0] - sizes[1] == 2 * linear - linear / 2 - linear / 64 * 4
