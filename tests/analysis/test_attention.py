"""Attention measures against values worked out by hand, and row by row without padding."""

import json
import math
import os

import numpy as np
import pytest
import torch
from pandas import DataFrame, MultiIndex
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import CONFIGS, WORDS, save_models, save_rows, tiny_model, tiny_tokenizer

from trl_promptkd.analysis.attention import (
    MEASURES,
    eager_attention,
    head_matrices,
    layer_sums,
    measure_attention,
    num_queries,
    same_depth,
    visible_entries,
)
from trl_promptkd.analysis.plots import plot_heads, plot_measures
from trl_promptkd.cli import main
from trl_promptkd.data import tokenize_row


ROWS = [
    {"prompt_ids": [6, 7], "completion_ids": [8, 9, 10, 0]},
    {"prompt_ids": [11, 12, 13, 14, 15, 16], "completion_ids": [17, 0]},
    {"prompt_ids": [18], "completion_ids": [19, 20, 21, 22, 23, 24, 25, 26]},
]
PROMPT = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def alone(model, row) -> list[np.ndarray]:
    """A row's attention in float64, `(heads, tokens, tokens)` a layer, by transformers' own way and without
    padding."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with eager_attention(model), torch.no_grad():
        return [w[0].double().numpy() for w in model(ids, output_attentions=True).attentions]


def expected_measures(model, rows, queries="completion") -> dict[str, list[float]]:
    """The definitions of docs/analysis.md in plain loops."""
    found = {measure: [] for measure in MEASURES}
    matrices = [alone(model, row) for row in rows]
    for layer in range(len(matrices[0])):
        entropies, focus, above, cosines = [], [], [], []
        for row, of_row in zip(rows, matrices, strict=True):
            first = len(row["prompt_ids"]) if queries == "completion" else 0
            for head, matrix in enumerate(of_row[layer]):
                for query in range(first, len(matrix)):
                    weights = matrix[query, : query + 1]
                    entropies.append(-sum(w * math.log(w) for w in weights if w > 0))
                    focus.append(weights[query])
                    above += [w > 0.1 for w in weights]
                if layer:
                    a, b = matrix[first:].ravel(), of_row[layer - 1][head][first:].ravel()
                    cosines.append(a @ b / math.sqrt((a @ a) * (b @ b)))
        for measure, values in zip(MEASURES, (entropies, focus, above, cosines), strict=True):
            found[measure].append(np.mean(values) if values else None)
    return found


def expected_variance(models, rows, layers, head) -> float:
    """numpy's variance over the models, a mean over the visible entries of a row, a mean over rows."""
    means = []
    for row in rows:
        stacked = np.stack([alone(model, row)[layer][head] for model, layer in zip(models, layers, strict=True)])
        first, size = len(row["prompt_ids"]), stacked.shape[-1]
        entries = [stacked[:, query, key].var() for query in range(first, size) for key in range(query + 1)]
        means.append(np.mean(entries))
    return float(np.mean(means))


def assert_same_measures(found, expected):
    for measure in MEASURES:
        a, b = (np.array(values[measure], dtype=float) for values in (found, expected))  # None is NaN
        assert a == pytest.approx(b, abs=1e-5, nan_ok=True), measure


class TestFormulas:
    def test_two_tokens_by_hand(self):
        weights = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
        entropy, focus, above, similarity = layer_sums(weights, None).tolist()
        assert entropy == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))  # the first row's is 0
        assert (focus, above) == (1.75, 3)
        assert math.isnan(similarity)
        before = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        assert layer_sums(weights, before)[3].item() == pytest.approx(1.25 / math.sqrt(2 * (1 + 0.0625 + 0.5625)))
        assert layer_sums(weights, weights)[3].item() == pytest.approx(1)

    def test_sparsity_counts_what_is_above_a_tenth_and_not_what_is_at_it(self):
        tenth = torch.tensor(0.1).item()
        assert layer_sums(torch.tensor([[[1.0, 0, 0], [tenth, 0.9, 0], [0.11, 0.09, 0.8]]]), None)[2] == 4

    def test_the_last_tokens_look_at_themselves_and_at_what_is_before_them(self):
        assert visible_entries(2, 5) == 4 + 5
        assert layer_sums(torch.tensor([[[0.5, 0.4, 0.1, 0], [0, 0, 0, 1]]]), None)[1] == pytest.approx(1.1)

    def test_same_depth_keeps_the_ends(self):
        assert [same_depth(layer, 4, 4) for layer in range(4)] == [0, 1, 2, 3]
        assert [same_depth(layer, 3, 7) for layer in range(3)] == [0, 3, 6]
        assert same_depth(0, 1, 5) == 0


class TestMeasureAttention:
    @pytest.mark.parametrize("family", CONFIGS)
    @pytest.mark.parametrize(("queries", "number"), [("completion", 14), ("all", 23)])
    def test_measures_are_the_definitions(self, family, queries, number):
        model = tiny_model(family)
        measures, heads = measure_attention({"m": model}, ROWS, queries=queries)
        assert_same_measures(measures.loc["m"], expected_measures(model, ROWS, queries))
        assert sum(num_queries(row, queries) for row in ROWS) == number
        assert heads.empty

    def test_heads_are_ranked_by_numpys_variance_over_models(self):
        models = [tiny_model(seed=seed) for seed in range(3)]
        _, heads = measure_attention(dict(zip("abc", models, strict=True)), ROWS)
        assert len({(head.layers["a"], head.head) for head in heads.itertuples()}) == len(heads) == 2 * 4
        for head in heads.itertuples():
            expected = expected_variance(models, ROWS, list(head.layers.values()), head.head)
            assert head.variance == pytest.approx(expected, rel=1e-4)
        assert heads.variance.is_monotonic_decreasing

    def test_models_of_other_depth_and_heads_are_compared_at_the_same_depth(self):
        models = [
            tiny_model(num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8, head_dim=8),
            tiny_model(seed=1, num_hidden_layers=3),
        ]
        measures, heads = measure_attention({"deep": models[0], "shallow": models[1]}, ROWS)
        assert {tuple(layers.values()) for layers in heads.layers} == {(0, 0), (2, 1), (4, 2)}
        assert set(heads["head"]) == {0, 1, 2, 3}
        for head in heads.itertuples():
            expected = expected_variance(models, ROWS, list(head.layers.values()), head.head)
            assert head.variance == pytest.approx(expected, rel=1e-4)
        for name, model in zip(("deep", "shallow"), models, strict=True):
            assert_same_measures(measures.loc[name], expected_measures(model, ROWS))

    def test_the_model_is_left_as_it_was(self):
        model = tiny_model(attention_dropout=0.5).train()
        measures, _ = measure_attention({"m": model}, ROWS)
        assert model.training
        assert model.config._attn_implementation == "sdpa"
        assert_same_measures(measures.loc["m"], expected_measures(tiny_model(), ROWS))

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"queries": "prompt"}, "must be 'completion' or 'all'"),
            ({"rows": [ROWS[0], {"prompt_ids": [6], "completion_ids": []}]}, "Row 1 of `rows` has no completion"),
            ({"models": {"m": tiny_model("mamba")}}, "The layers of .* give no attention weights"),
        ],
    )
    def test_bad_arguments_are_refused(self, change, error):
        with pytest.raises(ValueError, match=error):
            measure_attention(**{"models": {"m": tiny_model()}, "rows": ROWS, **change})

    def test_weights_that_are_not_finite_are_refused(self):
        model = tiny_model()
        model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="The attention of 'm' is not finite from layer 1 on"):
            measure_attention({"m": model}, ROWS)


class TestSoftPrompt:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
    def test_its_columns_are_taken_out_and_the_rest_scaled(self, family):
        model = tiny_model(family)
        measures, _ = measure_attention({"plain": model, "prompted": model}, ROWS, {"prompted": PROMPT})
        assert_same_measures(measures.loc["plain"], expected_measures(model, ROWS))
        assert measures.loc["plain"].soft_prompt_share.isna().all()
        entropies, outside = [], []
        for row in ROWS:
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
            embeds = torch.cat([PROMPT.unsqueeze(0), model.get_input_embeddings()(ids)], dim=1)
            with eager_attention(model), torch.no_grad():
                last = model(inputs_embeds=embeds, output_attentions=True).attentions[1][0].double().numpy()
            for matrix in last:
                for weights in matrix[3 + len(row["prompt_ids"]) :]:
                    text = weights[3:]
                    outside.append(weights[:3].sum())
                    entropies.append(-sum(w * math.log(w) for w in text / text.sum() if w > 0))
        assert measures.entropy["prompted", 1] == pytest.approx(np.mean(entropies), abs=1e-5)
        assert measures.soft_prompt_share["prompted", 1] == pytest.approx(np.mean(outside), abs=1e-5)
        assert 0.01 < np.mean(outside) < 0.99

    def test_rotary_positions_count_distances_only(self):
        """The first layer sees the text as without the prompt, and no later one does."""
        model = tiny_model()
        measures, _ = measure_attention({"plain": model, "prompted": model}, ROWS, {"prompted": PROMPT})
        plain, prompted = measures.entropy["plain"], measures.entropy["prompted"]
        assert prompted[0] == pytest.approx(plain[0], abs=1e-5)
        assert prompted[1] != pytest.approx(plain[1], abs=1e-3)


def test_head_matrices_are_those_of_the_row():
    models = {"a": tiny_model(num_hidden_layers=3), "b": tiny_model(seed=1)}
    heads = DataFrame({"head": [2, 0], "layers": [{"a": 2, "b": 1}, {"a": 0, "b": 0}]})
    found = head_matrices(models, ROWS[1], heads)
    for name, model in models.items():
        for head, matrix in zip(heads.itertuples(), found[name], strict=True):
            assert matrix.numpy() == pytest.approx(alone(model, ROWS[1])[head.layers[name]][head.head][6:], abs=1e-5)


def test_depth_has_more_marks_than_its_ends(tmp_path):
    layers = [("m", 0), ("m", 1), ("m", 2), ("n", 0), ("n", 1)]
    measures = DataFrame(0.5, MultiIndex.from_tuples(layers, names=["model", "layer"]), list(MEASURES))
    plot_measures(measures, tmp_path / "measures.svg")
    assert ">0.4</text>" in (tmp_path / "measures.svg").read_text().split("depth")[0]


def test_tokens_are_no_formulas(tmp_path):
    heads = DataFrame({"head": [0], "layers": [{"m": 0}]})
    plot_heads({"m": [torch.eye(3)[1:]]}, heads, [r"$\no$", "$$", "x"], str(tmp_path / "heads.png"))
    assert (tmp_path / "heads.png").stat().st_size > 1000


@pytest.fixture
def folder(tmp_path):
    save_models(tmp_path, student=tiny_model(num_hidden_layers=2), teacher=tiny_model(seed=1, num_hidden_layers=3))
    rows = [{"question": " ".join(WORDS[i : i + 3]), "answer": " ".join(WORDS[i : i + 2])} for i in range(6)]
    save_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "teacher_prompt").mkdir()
    save_file({"prompt_embeddings": PROMPT}, tmp_path / "teacher_prompt" / "adapter_model.safetensors")
    (tmp_path / "teacher_prompt" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    return tmp_path


def flags(folder, *more):
    return [
        *("analyze", "attention", "--model", str(folder / "student"), "--teacher", str(folder / "teacher")),
        *("--prompt", str(folder / "teacher_prompt"), "--dataset", str(folder / "rows.jsonl"), "--rows", "4"),
        *("--prompt_column", "question", "--completion_column", "answer", "--output_dir", str(folder / "out"), *more),
    ]


class TestCommand:
    def test_numbers_table_and_plots(self, folder, capsys):
        assert main(flags(folder)) == 0
        printed = capsys.readouterr().out
        assert "Attention of 12 tokens in 4 rows" in printed
        result = json.loads((folder / "out" / "attention.json").read_text())
        assert list(result["measures"]) == ["student", "teacher", "teacher, prompted"]
        assert [len(values["entropy"]) for values in result["measures"].values()] == [2, 3, 3]
        mean = sum(result["measures"]["student"]["entropy"]) / 2
        assert next(line for line in printed.splitlines() if "student" in line).split()[2] == f"{mean:.3f}"
        assert result["measures"]["teacher"]["similarity"][0] is None
        assert 0 < result["measures"]["teacher, prompted"]["soft_prompt_share"][0] < 1
        assert len(result["heads"]) == 8
        for name in ("attention_measures.png", "attention_heads.png"):
            assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")

    def test_json_is_all_of_standard_output(self, folder, capsys):
        assert main(flags(folder, "--json", "--queries", "all")) == 0
        result = json.loads(capsys.readouterr().out)
        assert result == json.loads((folder / "out" / "attention.json").read_text())
        assert result["num_queries"] == 4 * (3 + 3)

    def test_plots_as_svg(self, folder):
        assert main(flags(folder, "--plot_format", "svg")) == 0
        plots = {"attention_heads.svg", "attention_measures.svg"}
        assert set(os.listdir(folder / "out")) == {"attention.json", *plots}
        assert all((folder / "out" / name).read_text().rstrip().endswith("</svg>") for name in plots)

    def test_the_soft_prompt_takes_positions_too(self, folder, capsys):
        """128 positions: enough for 127 tokens, not for three virtual ones before them."""
        save_models(folder, student=tiny_model("gpt2"), teacher=tiny_model("gpt2", seed=1))
        save_rows(folder / "rows.jsonl", [{"question": "the " * 120, "answer": "cat " * 6}])
        given = flags(folder, "--max_length", "128")
        assert main(given) == 2
        assert "teacher' has 128 positions, but the longest row needs 130" in capsys.readouterr().err
        at = given.index("--prompt")
        assert main([*given[:at], *given[at + 2 :]]) == 0

    def test_a_saved_adapter_alone_has_measures_and_no_heads(self, folder, capsys):
        peft = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        peft.peft_config["default"].base_model_name_or_path = str(folder / "student")
        peft.save_pretrained(folder / "adapter")
        given = flags(folder)
        given[3:8] = [str(folder / "adapter")]  # no teacher, no prompt
        assert main(given) == 0
        assert "Heads in which" not in capsys.readouterr().out
        assert sorted(os.listdir(folder / "out")) == ["attention.json", "attention_measures.png"]
        result = json.loads((folder / "out" / "attention.json").read_text())
        rows = [{"prompt": " ".join(WORDS[i : i + 3]), "completion": " ".join(WORDS[i : i + 2])} for i in range(4)]
        rows = [tokenize_row(row, tiny_tokenizer()) for row in rows]
        assert_same_measures(result["measures"]["adapter"], expected_measures(peft.merge_and_unload(), rows))
