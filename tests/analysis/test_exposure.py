import csv
import json
import math
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import kl, log_probs
from tiny import prompt_dataset, save_models, save_rows, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_promptkd import PromptEncoderConfig, SoftPrompt
from trl_promptkd.analysis.exposure import exposure_bias, prefix_kl, sample_prefixes
from trl_promptkd.analysis.plot_style import check_matplotlib
from trl_promptkd.analysis.plots import plot_exposure, well_covered
from trl_promptkd.cli import main


PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]
EOS, NAN = 0, float("nan")


def sampling(max_new_tokens=8):
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=True, top_k=0, pad_token_id=EOS, eos_token_id=[EOS]
    )


def some_prompt(seed=1):
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))


def by_hand(student, teacher, rows, soft_prompt=None):
    """R or eps: sums over positions of means over the rows that have them, from one row, one prefix and no padding at
    a time."""
    total, sums = 0.0, []
    for place in range(max(len(completion) for _, completion in rows)):
        values = []
        for prompt, completion in rows:
            if place < len(completion):
                ids, first = [*prompt, *completion[:place], 0], len(prompt) + place
                p, q = log_probs(teacher, ids, first, soft_prompt), log_probs(student, ids, first)
                values.append(float(kl(p, q)))
        total += sum(values) / len(values)
        sums.append(total)
    return sums


class TestExposureBias:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("prompted", [False, True])
    def test_it_equals_loops_over_rows_and_prefixes(self, family, prompted):
        student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
        soft_prompt = some_prompt() if prompted else None
        samples = (
            sample_prefixes(student, PROMPTS, sampling(), batch_size=2),
            sample_prefixes(teacher, PROMPTS, sampling(), batch_size=2, soft_prompt=soft_prompt),
        )
        assert len({len(ids) for side in samples for ids in side}) > 1  # some end early
        sides = [
            prefix_kl(student, teacher, PROMPTS, side, EOS, batch_size=2, soft_prompt=soft_prompt) for side in samples
        ]
        found = exposure_bias(*sides)
        with torch.no_grad():
            regret, expected = (
                by_hand(student, teacher, list(zip(PROMPTS, side, strict=True)), soft_prompt) for side in samples
            )
        width = min(len(regret), len(expected))
        assert len(found) == width
        assert found.regret.tolist() == pytest.approx(regret[:width], rel=1e-4)
        assert found.expected.tolist() == pytest.approx(expected[:width], rel=1e-4)
        errors = [100 * (r - e) / e for r, e in zip(regret, expected, strict=False)]
        assert found.ex_acc_err.tolist() == pytest.approx(errors, rel=1e-3, abs=1e-3)
        assert found.ex_acc_err[1] == pytest.approx(0, abs=1e-4)  # before the first token there is no prefix
        assert max(map(abs, errors)) > 1
        assert found.rows_on_student.tolist() == [
            sum(len(ids) > place for ids in samples[0]) for place in range(width)
        ]

    def test_values_by_hand(self):
        on_student = torch.tensor([[1.0, 3.0, NAN], [1.0, NAN, NAN], [1.0, 5.0, NAN]])
        on_teacher = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, NAN]])
        found = exposure_bias(on_student, on_teacher)
        assert found.regret.tolist() == [1.0, 5.0]  # 1, then (3 + 5) / 2
        assert found.expected.tolist() == [1.0, 2.5]
        assert found.ex_acc_err.tolist() == [0.0, 100.0]
        assert found.rows_on_student.tolist() == found.rows_on_teacher.tolist() == [3, 2]
        assert found.kl_on_student[2] == 4.0
        # A position that no row reaches on one side is left out
        assert len(exposure_bias(torch.ones(3, 7), torch.ones(3, 2))) == 2

    def test_the_interval_holds_what_all_draws_give(self):
        """Two rows have four equally likely draws: errors of 0 (one row twice), 400 (the other) and 200 (both)."""
        on_student, on_teacher = torch.tensor([[1.0, 1.0], [1.0, 9.0]]), torch.ones(2, 2)
        found = exposure_bias(on_student, on_teacher)
        assert found.ex_acc_err.tolist() == [0.0, 200.0]
        assert (found.low.tolist(), found.high.tolist()) == ([0.0, 0.0], [0.0, 400.0])
        assert exposure_bias(on_student[:1], on_teacher[:1]).low.isna().all()

    def test_the_interval_narrows_with_the_rows_as_a_mean_does(self):
        generator = torch.Generator().manual_seed(0)

        def width(rows):
            on_student = 1 + torch.rand(rows, 1, generator=generator).expand(-1, 10)
            found = exposure_bias(on_student, torch.ones(rows, 10))
            return found.high[10] - found.low[10]

        # 100 times the mean of `rows` uniform numbers: +-1.96 standard errors
        assert width(400) == pytest.approx(100 * 2 * 1.96 * math.sqrt(1 / 12 / 400), rel=0.1)
        assert width(25) == pytest.approx(4 * width(400), rel=0.4)

    def test_a_student_that_is_its_teacher_has_no_error_to_speak_of(self):
        model = tiny_model()
        samples = sample_prefixes(model, PROMPTS, sampling())
        side = prefix_kl(model, model, PROMPTS, samples, EOS)
        found = exposure_bias(side, side)
        assert found.regret.abs().max() < 1e-6
        assert found[["ex_acc_err", "low", "high"]].isna().all(axis=None)

    def test_plots_end_where_rows_are_few(self):
        assert len(well_covered(exposure_bias(torch.ones(40, 4), torch.ones(40, 4)))) == 4
        few = torch.ones(40, 4)
        few[3:, 2:] = NAN  # three rows of forty
        assert len(well_covered(exposure_bias(few, torch.ones(40, 4)))) == 2


class TestSampling:
    def test_the_seed_alone_decides(self):
        model = tiny_model()
        torch.manual_seed(3)
        state = torch.get_rng_state()
        first = sample_prefixes(model, PROMPTS, sampling(), seed=1, batch_size=2)
        assert torch.get_rng_state().equal(state)
        torch.manual_seed(4)
        assert sample_prefixes(model, PROMPTS, sampling(), seed=1, batch_size=2) == first
        assert sample_prefixes(model, PROMPTS, sampling(), seed=2, batch_size=2) != first

    @pytest.mark.parametrize("soft_prompt", [None, some_prompt()])
    def test_other_models_draw_the_same_numbers_whatever_the_batch(self, soft_prompt):
        """Two models of other weights, whose head is blind: both then say what the same numbers draw from equal
        shares."""
        found = []
        for seed, batch_size in ((5, 1), (6, 2), (6, 3)):
            model = tiny_model(seed=seed)
            model.get_output_embeddings().weight.data.zero_()
            found.append(sample_prefixes(model, PROMPTS, sampling(), 1, batch_size, soft_prompt=soft_prompt))
        assert found[0] == found[1] == found[2]
        assert len({tuple(ids) for ids in found[0]}) == len(PROMPTS)

    def test_a_soft_prompt_counts(self):
        expected = sample_prefixes(tiny_model(seed=5), PROMPTS, sampling())
        assert sample_prefixes(tiny_model(seed=5), PROMPTS, sampling(), soft_prompt=some_prompt()) != expected

    def test_nan_among_the_weights_is_named(self):
        broken = tiny_model()
        broken.get_output_embeddings().weight.data[5] = NAN
        with pytest.raises(ValueError, match="hold NaN or infinities"):
            prefix_kl(tiny_model(), broken, PROMPTS, [[7], [8], [9]], EOS)


@pytest.fixture
def folder(tmp_path):
    save_models(tmp_path, teacher=tiny_model(seed=1), a=tiny_model(seed=2), b=tiny_model(seed=3))
    save_rows(tmp_path / "rows.jsonl", prompt_dataset(12))
    prompt = SoftPrompt(PromptEncoderConfig(num_virtual_tokens=3), tiny_model(seed=1), tiny_tokenizer())
    prompt.encoder.embedding.weight.data.add_(some_prompt())
    prompt.save_adapter(str(tmp_path / "run" / "teacher_prompt"))
    return tmp_path


def flags(folder, *more, students=("a", "b")):
    return [
        *("analyze", "exposure", "--teacher", str(folder / "teacher")),
        *("--model", *(str(folder / name) for name in students), "--dataset", str(folder / "rows.jsonl")),
        *("--rows", "9", "--max_new_tokens", "6", "--output_dir", str(folder / "out"), *more),
    ]


class TestCommand:
    def test_students_and_teachers_in_a_table_and_files(self, folder, capsys):
        assert main(flags(folder, "--prompt", str(folder / "run"))) == 0
        out = capsys.readouterr().out
        assert "a, prompted teacher" in out
        assert "R(l), nats" in out
        result = json.loads((folder / "out" / "exposure.json").read_text())
        assert [(c["student"][-1], c["teacher"]) for c in result["curves"]] == [
            ("a", "plain"),
            ("a", "prompted"),
            ("b", "plain"),
            ("b", "prompted"),
        ]
        assert result["curves"][0]["positions"][0]["rows_on_student"] == 9
        assert result["curves"][0]["positions"] != result["curves"][1]["positions"]
        with open(folder / "out" / "exposure.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == sum(len(curve["positions"]) for curve in result["curves"])
        assert float(rows[1]["regret"]) == result["curves"][0]["positions"][1]["regret"]
        assert (folder / "out" / "exposure.png").stat().st_size > 10_000

    def test_a_lora_adapter_as_a_student(self, folder, capsys):
        model = AutoModelForCausalLM.from_pretrained(folder / "a")
        adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        adapter.save_pretrained(folder / "adapter")
        assert main(flags(folder, "--json", students=["a", "adapter"])) == 0
        base, adapted = json.loads(capsys.readouterr().out)["curves"]
        at_start = [curve["positions"][0]["kl_on_student"] for curve in (base, adapted)]
        assert abs(at_start[0] - at_start[1]) > 1e-2

    def test_of_a_student_that_is_its_teacher_nothing_is_defined(self, folder, capsys):
        assert main(flags(folder, "--json", students=["teacher"])) == 0
        result = json.loads(capsys.readouterr().out)  # and nothing else
        assert {at["ex_acc_err"] for at in result["curves"][0]["positions"]} == {None}
        assert main(flags(folder, students=["teacher"])) == 0
        assert "\N{EM DASH}" in capsys.readouterr().out


class TestPlot:
    def test_many_checkpoints_have_lines_of_their_own(self, tmp_path):
        found = exposure_bias(torch.rand(9, 20), torch.rand(9, 20))
        plot_exposure({(f"checkpoint-{i}", "plain"): found for i in range(12)}, str(tmp_path / "many.png"))
        assert (tmp_path / "many.png").stat().st_size > 10_000

    def test_one_position_and_nothing_defined(self, tmp_path):
        plot_exposure({("a", "plain"): exposure_bias(torch.zeros(2, 1), torch.zeros(2, 1))}, str(tmp_path / "one.png"))
        assert (tmp_path / "one.png").exists()

    def test_without_matplotlib_the_extra_is_named(self, monkeypatch, folder, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r'pip install "trl_promptkd\[analysis\]"'):
            check_matplotlib()
        assert main(flags(folder)) == 2
        err = capsys.readouterr().err
        assert "trl_promptkd[analysis]" in err
        assert "Loading" not in err  # asked first
