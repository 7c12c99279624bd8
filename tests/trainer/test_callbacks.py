import random
import sys
from types import SimpleNamespace

import numpy
import pandas
import pytest
import torch
import trl
from datasets import Dataset
from runs import short_run
from tiny import answered_dataset, difference, tiny_model, tiny_tokenizer, weights
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_promptkd import (
    GenerationMetricsCallback,
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptKDConfig,
    PromptKDTrainer,
)
from trl_promptkd._trl import GKDConfig, GKDTrainer
from trl_promptkd.evaluation import evaluate_model
from trl_promptkd.metrics import instruction_scores
from trl_promptkd.trainer import callbacks


ROWS = answered_dataset(6)


class Keeps(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights(model)


class Records(TrainerCallback):
    """What the trainer's integrations get."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def settings(config, folder, **overrides):
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    common = {"max_steps": 3, **each_step, **overrides}
    if not hasattr(config, "max_new_tokens"):  # what `short_run` gives TRL's own configuration is not all known to it
        run = {"output_dir": str(folder / "run"), "per_device_train_batch_size": 2, "logging_steps": 1}
        run |= {"learning_rate": 1e-3, "report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True}
        return config(**{**run, **common})
    return short_run(config, folder, common)


def make(kind, folder, **overrides):
    more = {"model": tiny_model(seed=1), "train_dataset": answered_dataset(), "processing_class": tiny_tokenizer()}
    more["eval_dataset"] = overrides.pop("eval_dataset", answered_dataset(4))
    if kind == "sft":
        if trl.trainer.utils._ChunkedLogProbFunction is None:
            pytest.skip("TRL 1.15's SFTTrainer needs Triton, which PyTorch's CPU build does not have")
        return SFTTrainer(args=settings(SFTConfig, folder, **overrides), **more)
    if kind == "gkd":
        rows = Dataset.from_list(
            [
                {
                    "messages": [
                        {"role": "user", "content": row["prompt"]},
                        {"role": "assistant", "content": row["completion"]},
                    ]
                }
                for row in answered_dataset()
            ]
        )
        args = settings(GKDConfig, folder, lmbda=0.0, **overrides)
        return GKDTrainer(
            teacher_model=tiny_model(seed=2), args=args, **{**more, "train_dataset": rows, "eval_dataset": rows}
        )
    teacher = tiny_model(seed=2)
    if kind == "primed":
        args = settings(PrimedDistillConfig, folder, **overrides)
        return PrimedDistillTrainer(teacher_model=teacher, args=args, priming=PrimingTemplate("red "), **more)
    return PromptKDTrainer(teacher_model=teacher, args=settings(PromptKDConfig, folder, **overrides), **more)


KINDS = ("promptkd", "primed", "sft", "gkd")


class TestGenerationMetricsCallback:
    @pytest.mark.parametrize("kind", KINDS)
    def test_training_is_the_same_to_the_bit_and_metrics_are_logged(self, kind, tmp_path):
        runs = {}
        for name in ("without", "with"):
            torch.manual_seed(0)
            trainer = make(kind, tmp_path / name, save_strategy="no")
            if name == "with":
                trainer.add_callback(
                    GenerationMetricsCallback(trainer, ROWS, seed=3, max_new_tokens=5, num_completions_to_print=1)
                )
            trainer.train()
            states = (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()))
            runs[name] = (weights(trainer.model), states, trainer.state.log_history)
        assert difference(runs["with"][0], runs["without"][0]) == 0
        assert difference(runs["with"][0], weights(tiny_model(seed=1))) > 0
        assert runs["with"][1] == runs["without"][1]
        logged = [entry["eval_rougeL"] for entry in runs["with"][2] if "eval_rougeL" in entry]
        assert len(logged) == 3
        losses = [[entry["eval_loss"] for entry in runs[name][2] if "eval_loss" in entry] for name in runs]
        assert losses[0] == losses[1]

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_best_checkpoint_by_rouge_is_loaded_though_it_is_not_the_last(self, kind, tmp_path):
        """Real generation and real training; then answers of which 1, 3 and 2 of 6 are right stand in for those of steps 1, 2 and 3."""
        trainer = make(kind, tmp_path, metric_for_best_model="rougeL", load_best_model_at_end=True)
        callback = GenerationMetricsCallback(trainer, ROWS, max_new_tokens=5, num_completions_to_print=0)
        keeps, original, right = Keeps(), callback._answers, iter([1, 3, 2])

        def answers():
            assert len(original()) == len(ROWS)
            number = next(right)
            return [row["completion"] if i < number else "nothing" for i, row in enumerate(ROWS)]

        callback._answers = answers
        trainer.add_callback(callback)
        trainer.add_callback(keeps)
        trainer.train()
        logged = [entry["eval_rougeL"] for entry in trainer.state.log_history if "eval_rougeL" in entry]
        assert logged == pytest.approx([100 / 6, 300 / 6, 200 / 6])
        assert trainer.state.best_global_step == 2
        assert trainer.state.best_metric == logged[1]
        assert difference(weights(trainer.model), keeps.weights[2]) == 0
        assert difference(weights(trainer.model), keeps.weights[3]) > 0

    def test_real_answers_choose_the_best_checkpoint_and_its_weights_come_back(self, tmp_path):
        """After step 1 the head knows two words, of which it repeats one; after the others it says nothing but the end of text."""
        trainer = make(
            "sft", tmp_path, metric_for_best_model="eval_rougeL", load_best_model_at_end=True, learning_rate=0.0
        )
        rows = Dataset.from_list([{"prompt": "you are a", "references": ["the the the the", "cat cat cat cat"]}])
        word = tiny_tokenizer().convert_tokens_to_ids("the")
        keeps = Keeps()

        class Sets(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                head = model.get_output_embeddings().weight
                with torch.no_grad():
                    head.zero_()
                    if state.global_step == 1:  # opposite logits: one of the two is above all others
                        head[word], head[word + 1] = 1.0, -1.0

        trainer.add_callback(Sets())
        trainer.add_callback(keeps)
        trainer.add_callback(GenerationMetricsCallback(trainer, rows, max_new_tokens=4, num_completions_to_print=0))
        trainer.train()
        scores = [entry["eval_rougeL"] for entry in trainer.state.log_history if "eval_rougeL" in entry]
        assert scores[0] >= 50  # of the two references, one holds at least half of the answer
        assert scores[1:] == [0, 0]
        assert trainer.state.best_global_step == 1
        assert difference(weights(trainer.model), keeps.weights[1]) == 0
        assert difference(weights(trainer.model), keeps.weights[3]) > 0

    def test_metrics_are_those_of_evaluate_model(self, tmp_path):
        trainer = make("promptkd", tmp_path, save_strategy="no")
        records = Records()
        trainer.add_callback(GenerationMetricsCallback(trainer, ROWS, seed=7, max_new_tokens=5, batch_size=4))
        trainer.add_callback(records)
        found = trainer.evaluate()
        expected = evaluate_model(
            trainer.model, tiny_tokenizer(), {"rows": ROWS}, seeds=[7], max_new_tokens=5, batch_size=2
        )
        expected = expected["sets"]["rows"]["mean"]
        assert expected["rougeL"] > 0
        assert found["eval_rougeL"] == pytest.approx(expected["rougeL"])
        assert found["eval_exact_match"] == expected["exact_match"]
        assert [log["eval_rougeL"] for log in records.logs if "eval_rougeL" in log] == [found["eval_rougeL"]]

    @pytest.mark.parametrize("passed", ["before", "after"])
    def test_early_stopping_sees_the_metrics_wherever_it_was_passed(self, passed, tmp_path):
        """Answers of which 3, 2 and 1 of 6 are right: after the second evaluation without a better one it stops."""
        trainer = make(
            "sft",
            tmp_path,
            max_steps=6,
            metric_for_best_model="rougeL",
            load_best_model_at_end=True,
            save_only_model=True,
        )
        callback = GenerationMetricsCallback(trainer, ROWS, max_new_tokens=3, num_completions_to_print=0)
        right = iter([3, 2, 1])

        def answers():
            number = next(right)
            return [row["completion"] if i < number else "nothing" for i, row in enumerate(ROWS)]

        callback._answers = answers
        both = [callback, EarlyStoppingCallback(early_stopping_patience=2)]
        for one in reversed(both) if passed == "before" else both:
            trainer.add_callback(one)
        trainer.train()
        assert trainer.state.global_step == 3
        assert trainer.state.best_global_step == 1

    def test_rows_are_scored_once_and_only_shown_prompts_are_decoded(self, tmp_path, monkeypatch):
        trainer = make("sft", tmp_path, save_strategy="no")
        callback = GenerationMetricsCallback(trainer, ROWS, max_new_tokens=3, num_completions_to_print=0)
        trainer.add_callback(callback)
        scored, decoded = [], []
        original = callbacks.row_scores
        monkeypatch.setattr(callbacks, "row_scores", lambda *args: scored.append(1) or original(*args))
        decode = type(callback.tokenizer).batch_decode
        monkeypatch.setattr(
            type(callback.tokenizer),
            "batch_decode",
            lambda self, rows, **kwargs: decoded.append(len(rows)) or decode(self, rows, **kwargs),
        )
        trainer.evaluate()
        assert (scored, decoded) == ([1], [len(ROWS)])  # the answers alone
        callback.num_completions_to_print = 2
        trainer.evaluate()
        assert decoded[1:] == [len(ROWS), 2]

    def test_processors_give_their_tokenizer_and_nothing_else_will_do(self, tmp_path):
        trainer = make("sft", tmp_path, save_strategy="no")
        trainer.processing_class = SimpleNamespace(tokenizer=tiny_tokenizer())
        trainer.add_callback(GenerationMetricsCallback(trainer, ROWS, max_new_tokens=3))
        assert GenerationMetricsCallback(trainer, ROWS, max_new_tokens=3)._answers()
        for nothing, found in ((None, "none"), (SimpleNamespace(), "a SimpleNamespace")):
            trainer.processing_class = nothing
            with pytest.raises(ValueError, match=f"`processing_class` is {found}; it must be a tokenizer"):
                GenerationMetricsCallback(trainer, ROWS)

    def test_gsm8k(self, tmp_path):
        trainer = make("sft", tmp_path, save_strategy="no")
        rows = Dataset.from_list(
            [{"question": "the cat sat", "answer": "3 + 4\n#### 7"}, {"question": "red", "answer": "#### 5"}]
        )
        callback = GenerationMetricsCallback(trainer, rows, task="gsm8k", max_new_tokens=3)
        trainer.add_callback(callback)
        callback._answers = lambda: ["It is 7", "It is 7"]
        metrics = trainer.evaluate()
        found = {name: value for name, value in metrics.items() if "gsm8k" in name}
        assert found == {
            "eval_gsm8k_strict": 0.0,
            "eval_gsm8k_flexible": 50.0,
            "eval_gsm8k_paper": 50.0,
            "eval_gsm8k": 50.0,
        }
        logged = [entry for entry in trainer.state.log_history if "eval_gsm8k" in entry]
        assert [{name: entry[name] for name in found} for entry in logged] == [found]

    def test_thoughts_do_not_count(self, tmp_path):
        trainer = make("sft", tmp_path, save_strategy="no")
        rows = Dataset.from_list([{"instruction": "who", "output": "the cat"}] * 2)
        callback = GenerationMetricsCallback(trainer, rows, max_new_tokens=3)
        trainer.add_callback(callback)
        callback._answers = lambda: ["<think>a dog</think>the cat", "<think>the cat"]
        assert trainer.evaluate()["eval_exact_match"] == 50.0

    def test_a_dict_of_eval_sets_is_answered_once(self, tmp_path):
        sets = {"first": answered_dataset(3), "second": answered_dataset(4)}
        trainer = make("sft", tmp_path, save_strategy="no", eval_dataset=sets)
        callback = GenerationMetricsCallback(trainer, ROWS, max_new_tokens=3, num_completions_to_print=0)
        trainer.add_callback(callback)
        calls, original = [], callback._answers
        callback._answers = lambda: calls.append(1) or original()
        metrics = trainer.evaluate()
        assert len(calls) == 1
        assert {"eval_rougeL", "eval_first_loss", "eval_second_loss"} <= metrics.keys()
        assert "eval_rougeL" not in trainer.evaluate(answered_dataset(2), metric_key_prefix="test")

    def test_answers_are_printed_kept_and_logged_as_a_table(self, tmp_path, monkeypatch, capsys):
        tables = []
        fake = SimpleNamespace(run=object(), Table=lambda dataframe: dataframe, log=tables.append)
        trainer = make("sft", tmp_path, save_strategy="no")
        trainer.add_callback(
            GenerationMetricsCallback(
                trainer, ROWS, max_new_tokens=3, num_completions_to_print=2, log_completions=True
            )
        )
        trainer.args.report_to = ["wandb"]
        monkeypatch.setitem(sys.modules, "wandb", fake)
        metrics = trainer.evaluate()
        printed = capsys.readouterr().out
        assert "rougeL" in printed
        assert "suppose" in printed
        table = pandas.read_parquet(tmp_path / "run" / "eval_completions" / "completions_00000.parquet")
        assert list(table.columns) == ["step", "prompt", "completion", "rougeL", "exact_match"]
        assert table["rougeL"].mean() == pytest.approx(metrics["eval_rougeL"])
        references = [[row["completion"]] for row in ROWS]
        assert instruction_scores(list(table["completion"]), references)["rougeL"] == pytest.approx(
            metrics["eval_rougeL"]
        )
        assert tables[0]["eval_completions"].equals(table)

    def test_bad_arguments_are_refused_before_training(self, tmp_path):
        trainer = make("sft", tmp_path)
        with pytest.raises(TypeError, match="`trainer` is a Dataset; it must be a Trainer"):
            GenerationMetricsCallback(ROWS, ROWS)
        with pytest.raises(ValueError, match="`task` is 'mmlu'"):
            GenerationMetricsCallback(trainer, ROWS, task="mmlu")
        with pytest.raises(ValueError, match="Row 0 of `eval_dataset`: its right answer is None"):
            GenerationMetricsCallback(trainer, ROWS.remove_columns("completion"))
        with pytest.raises(ValueError, match="`max_new_tokens` is 0"):
            GenerationMetricsCallback(trainer, ROWS, max_new_tokens=0)
        trainer = make("sft", tmp_path)
        trainer.model = tiny_model("gpt2")
        with pytest.raises(ValueError, match="The model has 128 positions, but the longest row needs"):
            GenerationMetricsCallback(trainer, ROWS, max_new_tokens=200)
