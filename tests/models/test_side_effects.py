import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import WORDS, answered_dataset, difference, prompt_dataset, tiny_model, weights
from transformers import TrainerCallback

from trl_promptkd.models.side_effects import flags_restored, random_state_restored
from trl_promptkd.models.teacher import run_teacher


LORA = {"task_type": "CAUSAL_LM", "r": 4}


class EvaluateAtEachStep(TrainerCallback):
    """Asks for evaluations and predictions of its own, before the step is logged."""

    def __init__(self):
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()
        self.trainer.predict(answered_dataset(3))


def without_times(history):
    timed = ("runtime", "per_second", "tokens_per_second")
    training = [entry for entry in history if "loss" in entry]
    return [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in training]


def results_of(make_trainer, eval_dataset, source, dropout):
    """Weights, logs and next draws of six steps: without evaluations, with some between, with some inside them."""
    for evaluates in ("never", "steps", "callback"):
        torch.manual_seed(0)
        callback = EvaluateAtEachStep()
        trainer = make_trainer(
            tiny_model("gpt2", seed=1, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1),
            tiny_model("gpt2", seed=2),
            eval_dataset=eval_dataset,
            peft_config=LoraConfig(**LORA, lora_dropout=0.1) if dropout == "lora" else None,
            callbacks=[callback] if evaluates == "callback" else None,
            max_steps=6,
            learning_rate=0.01,
            disable_dropout=dropout == "lora",
            response_source=source,
            eval_strategy="steps" if evaluates == "steps" else "no",
            eval_steps=1,
        )
        callback.trainer = trainer
        if evaluates == "callback":
            trainer.evaluate()
        trainer.train()
        drawn = (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())
        yield weights(trainer.model), without_times(trainer.state.log_history), drawn


class TestEvaluation:
    """Six steps with evaluations equal six steps without, bitwise: weights and what is logged."""

    @pytest.mark.parametrize("source", ["dataset", "student"])
    @pytest.mark.parametrize("dropout", ["lora", "model"])
    def test_changes_nothing_in_what_follows(self, make_trainer, source, dropout):
        first, *others = results_of(make_trainer, answered_dataset(4), source, dropout)
        for result in others:
            assert difference(first[0], result[0]) == 0
            assert result[1:] == first[1:]

    @pytest.mark.parametrize("make_trainer", ["promptkd"], indirect=True)
    def test_answers_that_the_teacher_writes_in_it_change_nothing(self, make_trainer):
        first, *others = results_of(make_trainer, prompt_dataset(4), "student", "lora")
        for result in others:
            assert difference(first[0], result[0]) == 0
            assert result[1:] == first[1:]

    def test_modes_are_what_they_were(self, make_trainer):
        trainer = make_trainer(eval_dataset=answered_dataset(4))
        trainer.model.train()
        trainer.model.model.layers[0].eval()
        modes = [module.training for module in trainer.model.modules()]
        trainer.evaluate()
        trainer.predict(answered_dataset(3))
        assert [module.training for module in trainer.model.modules()] == modes


class TestFrozenAdapterWeights:
    """PEFT makes all weights of an adapter trainable when it is switched on again, or loaded."""

    def student(self):
        torch.manual_seed(0)
        student = get_peft_model(tiny_model(seed=1), LoraConfig(**LORA, init_lora_weights=False))
        for name, parameter in student.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return student

    def frozen(self, model):
        return {name: value for name, value in weights(model).items() if "lora_A" in name}

    def test_self_distillation_after_an_evaluation(self, make_trainer):
        norms = []
        for evaluates in (False, True):
            settings = {"max_steps": 3, "learning_rate": 0.05, "response_source": "student"}
            trainer = make_trainer(self.student(), eval_dataset=answered_dataset(4), **settings)
            before = self.frozen(trainer.model)
            if evaluates:
                trainer.evaluate()
            trainer.train()
            assert difference(self.frozen(trainer.model), before) == 0
            assert all(p.requires_grad == ("lora_B" in n) for n, p in trainer.model.named_parameters())
            norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        assert norms[0] == norms[1]
        assert len(norms[0]) == 3

    def test_resuming(self, make_trainer, tmp_path):
        trainer = make_trainer(self.student(), max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.05)
        trainer.train()
        resumed = make_trainer(self.student(), max_steps=4, learning_rate=0.05)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert difference(weights(resumed.model), weights(trainer.model)) == 0
        assert all(p.requires_grad == ("lora_B" in n) for n, p in resumed.model.named_parameters())

    def test_the_best_checkpoint(self, make_trainer):
        settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 2}
        trainer = make_trainer(self.student(), eval_dataset=answered_dataset(4), **settings)
        trainer.train()
        assert all(p.requires_grad == ("lora_B" in n) for n, p in trainer.model.named_parameters())

    def test_the_teacher_below_the_adapter(self):
        student = self.student().train()
        student.base_model.model.model.layers[1].eval()
        flags = {name: p.requires_grad for name, p in student.named_parameters()}
        modes = [module.training for module in student.modules()]
        with run_teacher(None, student) as teacher:
            assert not any(module.training for module in teacher.modules())
        assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
        assert [module.training for module in student.modules()] == modes


class TestRestored:
    def test_flags_after_an_error(self):
        model = tiny_model().train()
        model.lm_head.requires_grad_(False)

        def fail():
            with flags_restored(model):
                model.eval().requires_grad_(True)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert not model.lm_head.weight.requires_grad
        assert model.training

    def test_random_states(self):
        def drawn():
            return torch.rand(1).item(), np.random.rand(), random.random()

        with random_state_restored(torch.device("cpu")):
            first = drawn()
        assert drawn() == first


class TestStopStrings:
    def test_samples_end_with_them_and_count_as_ended(self, make_trainer):
        stops = {word for word in WORDS[::2] if len(word) > 2}  # of which none is a part of another word
        settings = {"response_source": "student", "max_new_tokens": 12, "eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(
            teacher_model=tiny_model(seed=2),
            eval_dataset=prompt_dataset(4),
            generation_kwargs={"stop_strings": sorted(stops)},
            **settings,
        )
        trainer.train()
        samples = trainer._samples.completions
        words = [trainer.processing_class.convert_ids_to_tokens(ids) for ids in samples]
        assert all(not stops & set(row[:-1]) for row in words)
        assert sum(row[-1] in stops for row in words) > 0
        share = sum(row[-1] in {*stops, "<eos>"} for row in words) / len(words)
        assert trainer.state.log_history[0]["rollout/terminated_share"] == pytest.approx(share)


class TestStreamedEvaluation:
    """On several ranks, accelerate cannot share a stream out evenly: its last rows would count twice."""

    def test_is_refused_on_several_ranks(self, make_trainer, monkeypatch):
        stream = answered_dataset(4).to_iterable_dataset()
        trainer = make_trainer(eval_dataset=stream)
        trainer.evaluate()
        monkeypatch.setattr(type(trainer.args), "world_size", 2)
        message = r"is streamed, but it is shared out to 2 processes.*Load it without streaming"
        with pytest.raises(ValueError, match=f"`test_dataset` {message}"):
            trainer.predict(stream)
        for given, name in ((stream, "eval_dataset"), ({"a": stream}, r"eval_dataset\['a'\]")):
            with pytest.raises(ValueError, match=f"`{name}` {message}"):
                trainer.evaluate(given)
            with pytest.raises(ValueError, match=f"`{name}` {message}"):
                make_trainer(eval_dataset=given)
