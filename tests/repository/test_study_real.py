"""The real model's study at tiny shapes: what is finished is kept, and what is kept is not run again."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer, words
from trainers import needs_sft

from trl_promptkd import PrimingTemplate
from trl_promptkd.evaluation import evaluate_model


FLAGS = (
    "--methods PromptKD SFT --seeds 0 --steps 1 --batch 2 --micro_batch 1 --rows 2 --other_rows 1 --student_layers 1 "
    "--train_rows 2 --warm_steps 2 --stop_every 2 --stop_rows 1 --text_rows 2"
)


@pytest.fixture
def driver(study):
    return study("real_study")


def data_row(number):
    return {"instruction": words(number, 3), "input": "", "output": words(number + 4, 3)}


@pytest.fixture
def data(tmp_path, study):
    """Six rows to train on, and the held-out ones of every set."""
    models = study("real_models")
    rows = {models.TRAIN: range(6), models.DEV: [6, 7], **{path: [8, 9] for path in models.TEST.values()}}
    for path, numbers in rows.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("".join(json.dumps(data_row(number)) + "\n" for number in numbers))
    return tmp_path


@pytest.fixture
def tiny(study, driver, monkeypatch):
    needs_sft()
    monkeypatch.setattr(driver, "load_smollm2", lambda: (tiny_model(), tiny_tokenizer()))
    for name in ("real_measure", "real_study"):
        monkeypatch.setattr(study(name), "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(driver, "TEXTS", [PrimingTemplate("red "), PrimingTemplate("blue ")])


class TestDriver:
    def test_finished_runs_are_lines_and_are_not_run_again(self, driver, tiny, data, monkeypatch):
        results = data / "results.jsonl"
        flags = [*FLAGS.split(), "--data", str(data), "--folder", str(data / "kept"), "--results", str(results)]
        driver.main(flags)
        found = [json.loads(line) for line in results.read_text().splitlines()]
        assert [one["record"] for one in found] == ["teacher", "texts", "warm student", "run", "run"]
        assert [one["settings"]["method"] for one in found[3:]] == ["PromptKD", "SFT"]
        of_promptkd, of_sft = (one["measures"]["dolly"] for one in found[3:])
        assert set(of_promptkd) - set(of_sft) == {"reverse_kl_prompted", "prompted_plain", "prompted_entropy"}
        before = results.read_bytes()
        monkeypatch.setattr(driver.Study, "train", lambda *args: pytest.fail("was run again"))
        driver.main(flags)
        assert results.read_bytes() == before

    def test_a_bare_machine_goes_on_from_the_lines_alone(self, driver, tiny, data):
        """A second method, after the folder of models is lost: the same warm student, and the chosen text."""
        results = data / "results.jsonl"
        common = [*FLAGS.split(), "--data", str(data), "--results", str(results)]
        driver.main([*common, "--folder", str(data / "kept"), "--methods", "SFT"])
        driver.main([*common, "--folder", str(data / "other"), "--methods", "SFT", "GKD, fixed text"])
        found = [json.loads(line) for line in results.read_text().splitlines()]
        assert [one["record"] for one in found] == ["teacher", "texts", "warm student", "run", "run"]
        assert found[3]["warm_nll"] == found[4]["warm_nll"]
        assert found[4]["seconds"]["before"] == found[1]["seconds"] > 0

    @pytest.mark.parametrize("method", ["GKD", "SeqKD", "SeqKD then GKD, fixed text"])
    def test_other_methods_change_the_student(self, driver, tiny, data, method):
        flags = [*FLAGS.split(), "--batch", "1", "--train_rows", "4", "--data", str(data), "--folder", str(data)]
        args = driver.parse([*flags, "--results", str(data / "results.jsonl")])
        runs = driver.Study(args)
        found = runs.train(method, 0, 4)  # the first step's learning rate is 0
        warm = driver.kept(runs.warm)[0].state_dict()
        changed = {name for name, value in found["student"].state_dict().items() if not value.equal(warm[name])}
        assert any("layers" in name for name in changed)
        assert not any("embed" in name for name in changed)
        assert len(found["log"]) == (2 if "then" in method else 1)

    def test_the_tuned_teacher_is_another_one_and_is_kept(self, driver, tiny, data):
        flags = [*FLAGS.split(), "--teacher", "tuned", "--data", str(data), "--folder", str(data / "kept")]
        args = driver.parse([*flags, "--results", str(data / "results.jsonl")])
        teacher = driver.Study(args).teacher.state_dict()
        again = driver.Study(args).teacher.state_dict()
        plain = tiny_model().state_dict()
        assert all(value.equal(again[name]) for name, value in teacher.items())
        assert any(not value.equal(plain[name]) for name, value in teacher.items())


class TestData:
    def test_no_held_out_row_is_trained_on(self, study, data):
        path = data / study("real_models").TRAIN
        path.write_text(path.read_text() + json.dumps(data_row(8)) + "\n")
        args = SimpleNamespace(data=data, train_rows=1, stop_rows=1, rows=10, other_rows=1, batch=2)
        found = study("real_models").read_data(args, tiny_tokenizer())
        assert [row["reference"] for row in found.warm + found.train] == [
            data_row(i)["output"]
            for i in (0, 1, 2, 3, 5)  # whole steps of 2
        ]
        assert [row["reference"] for row in found.test["dolly"] + found.stop] == [
            data_row(i)["output"] for i in (8, 9, 6, 7)
        ]
        assert len(found.test["vicuna"]) == 1

    def test_long_rows_are_left_out_and_long_answers_elsewhere_cut(self, study, data, monkeypatch):
        models = study("real_models")
        monkeypatch.setattr(models, "MAX_ANSWER", 3)  # an answer has three words and its end
        path = data / models.TEST["vicuna"]
        assert models.read_rows(path, tiny_tokenizer()) == []
        assert [len(row["completion_ids"]) for row in models.read_rows(path, tiny_tokenizer(), False)] == [3, 3]


def test_sft_trains_on_the_answers_alone(study, data):
    models = study("real_models")
    rows = models.read_rows(data / models.TRAIN, tiny_tokenizer())
    rows[0]["completion_ids"] *= 2
    settings = {"output_dir": str(data), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 6}
    settings["train_sampling_strategy"] = "sequential"
    trainer = models.sft_trainer(tiny_model(), tiny_tokenizer(), models.answered(rows, 6), settings)
    (batch,) = trainer.get_train_dataloader()
    kept = [ids[ids != -100].tolist() for ids in batch["labels"]]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert lengths == sorted(lengths)
    assert sorted(kept) == sorted(row["completion_ids"] for row in rows)


class TestStop:
    @pytest.mark.parametrize(("nlls", "stops"), [([2.0, 1.9], False), ([2.0, 1.99], True), ([2.0, 2.1], True)])
    def test_ends_at_an_improvement_below_one_percent(self, study, monkeypatch, nlls, stops):
        class State:
            global_step = 25
            should_training_stop = False

        values = iter(nlls)
        monkeypatch.setattr(study("real_models"), "answers_nll", lambda *args: next(values))
        rule, state = study("real_models").UntilItFlattens(25, [], 0), State()
        rule.on_train_begin(None, state, state)
        rule.on_step_end(None, state, state)
        assert state.should_training_stop is stops
        assert [one["nll"] for one in rule.curve] == nlls


class TestMeasures:
    @pytest.fixture
    def rows(self, study, data):
        return study("real_models").read_rows(data / study("real_models").TEST["dolly"], tiny_tokenizer())

    def test_rouge_is_that_of_evaluate_model(self, study, rows):
        """Equal, although samples are drawn once for all measures."""
        measures, model, tokenizer = study("real_measure"), tiny_model(), tiny_tokenizer()
        samples = measures.both_samples(model, tokenizer, {"dolly": rows})
        found = measures.measure(model, samples, tokenizer, {"dolly": rows})["dolly"]
        asked = Dataset.from_list([data_row(8), data_row(9)])
        known = evaluate_model(
            model, tokenizer, {"dolly": asked}, seeds=measures.SEEDS, max_new_tokens=measures.MAX_NEW_TOKENS
        )["sets"]["dolly"]
        assert found["rougeL"]["mean"] == pytest.approx(known["mean"]["rougeL"])
        assert found["rougeL"]["by_seed"] == pytest.approx([run["rougeL"] for run in known["runs"]])
        assert found["ended"] == pytest.approx(known["terminated_share"])

    @torch.no_grad()
    def test_sums_are_those_of_each_row_alone(self, study, rows):
        """Every value again, from the whole logits of one row without padding."""
        measures, tokenizer = study("real_measure"), tiny_tokenizer()
        student, teacher, text = tiny_model(seed=1), tiny_model(seed=2), PrimingTemplate("red ")
        primed = study("real_study").primed_ids(rows, text, tokenizer)
        assert [len(ids) - len(row["prompt_ids"]) for ids, row in zip(primed, rows, strict=True)] == [1, 1]
        random.seed(0)
        samples = [[random.randrange(6, 30) for _ in range(length)] for length in (2, 5)]
        sets, of = {"dolly": rows}, {"dolly": [samples, samples[::-1]]}
        theirs = {"dolly": [[[7, 8, 9], [10]], []]}
        found = measures.measure(student, of, tokenizer, sets, teacher, theirs, lambda rows: (teacher, None, primed))[
            "dolly"
        ]

        def log_probs(model, prompt, answer):
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            return logits.double().log_softmax(-1)

        def kl(a, b):
            return (a.exp() * (a - b)).sum().item()

        expected: dict[str, list[float]] = {}
        for index, row in enumerate(rows):
            prompt, own, other = row["prompt_ids"], samples[index], theirs["dolly"][0][index]
            q, p, primed_p = (
                log_probs(model, ids, own)
                for model, ids in ((student, prompt), (teacher, prompt), (teacher, primed[index]))
            )
            gold = log_probs(student, prompt, row["completion_ids"])
            values = {
                "gold_nll": -sum(gold[i, token].item() for i, token in enumerate(row["completion_ids"])),
                "reverse_kl": kl(q, p),
                "entropy": -(q.exp() * q).sum().item(),
                "teacher_entropy": -(p.exp() * p).sum().item(),
                "reverse_kl_prompted": kl(q, primed_p),
                "prompted_plain": kl(primed_p, p),
                "prompted_entropy": -(primed_p.exp() * primed_p).sum().item(),
                "forward_kl": kl(log_probs(teacher, prompt, other), log_probs(student, prompt, other)),
            }
            for name, value in values.items():
                expected.setdefault(name, []).append(value)
        for name, values in expected.items():
            number = {"gold_nll": 8, "forward_kl": 4}.get(name, 7)
            assert found[name]["rows"] == pytest.approx(values, abs=6e-3), name
            assert found[name]["per_answer"] == pytest.approx(sum(values) / 2, abs=1e-4), name
            assert found[name]["per_token"] == pytest.approx(sum(values) / number, abs=1e-4), name
        assert found["mean_length"] == 3.5


def test_interval_by_hand(driver):
    # Variance 10 / 4 of five numbers
    assert driver.mean_and_half([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx([3.0, 1.96 * 2.5**0.5 / 5**0.5])
