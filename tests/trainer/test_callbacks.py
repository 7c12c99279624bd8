import random
import sys
from types import SimpleNamespace

import numpy
import pandas
import pytest
import torch
from datasets import Dataset
from tiny import answered_dataset, chat_dataset, difference, tiny_model, tiny_tokenizer, weights
from trainers import EVALUATES, METHODS, SAVES, Maker, logged, needs_sft
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_promptkd import GenerationMetricsCallback
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


SETTINGS = {**EVALUATES, **SAVES, "max_steps": 3}
# As in `short_run`, for TRL's configurations, which have no `max_new_tokens`
RUN = {"per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none"}
RUN |= {"bf16": False, "use_cpu": True, "disable_tqdm": True}


def make_trainer(kind, folder, **overrides):
    """Of this package, or of TRL."""
    more = {"eval_dataset": overrides.pop("eval_dataset", answered_dataset(4))}
    settings = {**SETTINGS, **overrides}
    if kind in METHODS:
        return Maker(kind, folder)(**more, **settings)
    more |= {"model": tiny_model(seed=1), "processing_class": tiny_tokenizer()}
    settings = {**RUN, "output_dir": str(folder / "run"), **settings}
    if kind == "gkd":
        rows = chat_dataset()
        args = GKDConfig(**settings, lmbda=0.0, max_new_tokens=6)
        return GKDTrainer(
            teacher_model=tiny_model(seed=2), args=args, **{**more, "train_dataset": rows, "eval_dataset": rows}
        )
    needs_sft()
    return SFTTrainer(args=SFTConfig(**settings), train_dataset=answered_dataset(), **more)


def add_callback(trainer, rows=ROWS, answers=None, **settings):
    """A callback that prints nothing. `answers`: those of each evaluation, in place of the model's."""
    callback = GenerationMetricsCallback(trainer, rows, **{"num_completions_to_print": 0, **settings})
    trainer.add_callback(callback)
    if answers is not None:
        replies = iter(answers)
        callback._answers = lambda: next(replies)
    return callback


def right(number):
    """Answers to `ROWS`, of which `number` are right."""
    return [row["completion"] if i < number else "nothing" for i, row in enumerate(ROWS)]


KINDS = (*METHODS, "sft", "gkd")


class TestGenerationMetricsCallback:
    @pytest.mark.parametrize("kind", KINDS)
    def test_training_is_the_same_to_the_bit_and_metrics_are_logged(self, kind, tmp_path):
        runs = {}
        for name in ("without", "with"):
            torch.manual_seed(0)
            trainer = make_trainer(kind, tmp_path / name, save_strategy="no")
            if name == "with":
                add_callback(trainer, seed=3, max_new_tokens=5, num_completions_to_print=1)
            trainer.train()
            states = (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()))
            runs[name] = (weights(trainer.model), states, logged(trainer, "eval_loss"), logged(trainer, "eval_rougeL"))
        assert difference(runs["with"][0], runs["without"][0]) == 0
        assert difference(runs["with"][0], weights(tiny_model(seed=1))) > 0
        assert runs["with"][1:3] == runs["without"][1:3]
        assert len(runs["with"][3]) == 3

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_best_checkpoint_by_rouge_is_loaded_though_it_is_not_the_last(self, kind, tmp_path):
        """Real training, and answers of which 1, 3 and 2 of 6 are right after steps 1, 2 and 3."""
        trainer = make_trainer(kind, tmp_path, metric_for_best_model="rougeL", load_best_model_at_end=True)
        keeps = Keeps()
        add_callback(trainer, answers=map(right, [1, 3, 2]))
        trainer.add_callback(keeps)
        trainer.train()
        scores = logged(trainer, "eval_rougeL")
        assert scores == pytest.approx([100 / 6, 300 / 6, 200 / 6])
        assert trainer.state.best_global_step == 2
        assert trainer.state.best_metric == scores[1]
        assert difference(weights(trainer.model), keeps.weights[2]) == 0
        assert difference(weights(trainer.model), keeps.weights[3]) > 0

    def test_real_answers_choose_the_best_checkpoint_and_its_weights_come_back(self, tmp_path):
        """After step 1 the head knows two words and repeats one of them; after the others it ends at once."""
        settings = {"metric_for_best_model": "eval_rougeL", "load_best_model_at_end": True, "learning_rate": 0.0}
        trainer = make_trainer("sft", tmp_path, **settings)
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
        add_callback(trainer, rows, max_new_tokens=4)
        trainer.train()
        scores = logged(trainer, "eval_rougeL")
        assert scores[0] >= 50  # of the two references, one holds at least half of the answer
        assert scores[1:] == [0, 0]
        assert trainer.state.best_global_step == 1
        assert difference(weights(trainer.model), keeps.weights[1]) == 0
        assert difference(weights(trainer.model), keeps.weights[3]) > 0

    def test_metrics_are_those_of_evaluate_model(self, tmp_path):
        trainer = make_trainer("promptkd", tmp_path)
        add_callback(trainer, seed=7, max_new_tokens=5, batch_size=4)
        found = trainer.evaluate()
        settings = {"seeds": [7], "max_new_tokens": 5, "batch_size": 2}
        expected = evaluate_model(trainer.model, tiny_tokenizer(), {"rows": ROWS}, **settings)["sets"]["rows"]["mean"]
        assert expected["rougeL"] > 0
        assert found["eval_rougeL"] == pytest.approx(expected["rougeL"])
        assert found["eval_exact_match"] == expected["exact_match"]
        assert logged(trainer, "eval_rougeL") == [found["eval_rougeL"]]

    @pytest.mark.parametrize("passed", ["before", "after"])
    def test_early_stopping_sees_the_metrics_wherever_it_was_passed(self, passed, tmp_path):
        """Answers of which 3, 2 and 1 of 6 are right: after the second evaluation without a better one it stops."""
        settings = {"metric_for_best_model": "rougeL", "load_best_model_at_end": True, "save_only_model": True}
        trainer = make_trainer("sft", tmp_path, max_steps=6, **settings)
        stop = EarlyStoppingCallback(early_stopping_patience=2)
        if passed == "before":
            trainer.add_callback(stop)
        add_callback(trainer, answers=map(right, [3, 2, 1]))
        if passed == "after":
            trainer.add_callback(stop)
        trainer.train()
        assert trainer.state.global_step == 3
        assert trainer.state.best_global_step == 1

    def test_rows_are_scored_once_and_only_shown_prompts_are_decoded(self, tmp_path, monkeypatch):
        trainer = make_trainer("sft", tmp_path)
        callback = add_callback(trainer, max_new_tokens=3)
        scored, decoded, tokenizer_class = [], [], type(callback.tokenizer)
        score, decode = callbacks.row_scores, tokenizer_class.batch_decode
        monkeypatch.setattr(callbacks, "row_scores", lambda *args: scored.append(1) or score(*args))
        monkeypatch.setattr(
            tokenizer_class,
            "batch_decode",
            lambda self, rows, **kwargs: decoded.append(len(rows)) or decode(self, rows, **kwargs),
        )
        trainer.evaluate()
        assert (scored, decoded) == ([1], [len(ROWS)])  # the answers alone
        callback.num_completions_to_print = 2
        trainer.evaluate()
        assert decoded[1:] == [len(ROWS), 2]

    def test_processors_give_their_tokenizer_and_nothing_else_will_do(self, tmp_path):
        trainer = make_trainer("sft", tmp_path)
        trainer.processing_class = SimpleNamespace(tokenizer=tiny_tokenizer())
        add_callback(trainer, max_new_tokens=3)
        assert "eval_rougeL" in trainer.evaluate()
        trainer.processing_class = SimpleNamespace()
        with pytest.raises(ValueError, match="`processing_class` is a SimpleNamespace; it must be a tokenizer"):
            GenerationMetricsCallback(trainer, ROWS)

    def test_gsm8k(self, tmp_path):
        trainer = make_trainer("sft", tmp_path)
        rows = [{"question": "the cat sat", "answer": "3 + 4\n#### 7"}, {"question": "red", "answer": "#### 5"}]
        add_callback(trainer, Dataset.from_list(rows), task="gsm8k", answers=[["It is 7", "It is 7"]])
        found = {name: value for name, value in trainer.evaluate().items() if "gsm8k" in name}
        assert found == {
            "eval_gsm8k_strict": 0.0,
            "eval_gsm8k_flexible": 50.0,
            "eval_gsm8k_paper": 50.0,
            "eval_gsm8k": 50.0,
        }
        assert {name: logged(trainer, name) for name in found} == {name: [value] for name, value in found.items()}

    def test_thoughts_do_not_count(self, tmp_path):
        trainer = make_trainer("sft", tmp_path)
        rows = Dataset.from_list([{"instruction": "who", "output": "the cat"}] * 2)
        add_callback(trainer, rows, answers=[["<think>a dog</think>the cat", "<think>the cat"]])
        assert trainer.evaluate()["eval_exact_match"] == 50.0

    def test_a_dict_of_eval_sets_is_answered_once(self, tmp_path):
        sets = {"first": answered_dataset(3), "second": answered_dataset(4)}
        trainer = make_trainer("sft", tmp_path, eval_dataset=sets)
        add_callback(trainer, answers=[right(3)])  # a second time fails
        metrics = trainer.evaluate()
        assert {"eval_rougeL", "eval_first_loss", "eval_second_loss"} <= metrics.keys()
        assert "eval_rougeL" not in trainer.evaluate(answered_dataset(2), metric_key_prefix="test")

    def test_answers_are_printed_kept_and_logged_as_a_table(self, tmp_path, monkeypatch, capsys):
        tables = []
        fake = SimpleNamespace(run=object(), Table=lambda dataframe: dataframe, log=tables.append)
        trainer = make_trainer("sft", tmp_path)
        add_callback(trainer, max_new_tokens=3, num_completions_to_print=2, log_completions=True)
        trainer.args.report_to = ["wandb"]
        monkeypatch.setitem(sys.modules, "wandb", fake)
        metrics = trainer.evaluate()
        printed = capsys.readouterr().out
        assert "rougeL" in printed
        assert "suppose" in printed
        table = pandas.read_parquet(tmp_path / "run" / "eval_completions" / "completions_00000.parquet")
        assert list(table.columns) == ["step", "prompt", "completion", "rougeL", "exact_match"]
        assert table["rougeL"].mean() == pytest.approx(metrics["eval_rougeL"])
        scores = instruction_scores(list(table["completion"]), [[row["completion"]] for row in ROWS])
        assert scores["rougeL"] == pytest.approx(metrics["eval_rougeL"])
        assert tables[0]["eval_completions"].equals(table)

    def test_bad_arguments_are_refused_before_training(self, tmp_path):
        trainer = make_trainer("sft", tmp_path)
        with pytest.raises(ValueError, match="Row 0 of `eval_dataset`: its right answer is None"):
            add_callback(trainer, ROWS.remove_columns("completion"))
        with pytest.raises(ValueError, match="`max_new_tokens` is 0"):
            add_callback(trainer, max_new_tokens=0)
        trainer.model = tiny_model("gpt2")
        with pytest.raises(ValueError, match="The model has 128 positions, but the longest row needs"):
            add_callback(trainer, max_new_tokens=200)
