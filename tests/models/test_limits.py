import math

import pytest
from datasets import Dataset
from tiny import WORDS, answered_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import (
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDTrainer,
    build_teacher_cache,
)


SIZE = 30  # the tiny tokenizer's tokens


def extended(**special):
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.add_special_tokens(special or {"additional_special_tokens": ["<chat>"]})
    assert len(tokenizer) == SIZE + 1
    return tokenizer


def small(seed, resized=False):
    model = tiny_model(seed=seed, vocab_size=SIZE)
    if resized:
        model.resize_token_embeddings(SIZE + 1)
    return model


@pytest.fixture(params=["promptkd", "primed"])
def make_trainer(request, make_args, make_primed_args):
    """A trainer of either kind; `priming` is left out by PromptKD."""

    def make(tokenizer, resized=(), rows=None, eval_rows=None, priming="red ", **settings):
        as_data = Dataset.from_list(rows) if isinstance(rows, list) else rows
        given = {
            "model": small(1, "student" in resized),
            "teacher_model": small(2, "teacher" in resized),
            "train_dataset": answered_dataset() if rows is None else as_data,
            "eval_dataset": None if eval_rows is None else Dataset.from_list(eval_rows),
            "processing_class": tokenizer,
        }
        if request.param == "promptkd":
            prompt = PromptEncoderConfig(prompt_init="random")
            return PromptKDTrainer(args=make_args(lmbda=0.0, **settings), prompt_encoder_config=prompt, **given)
        return PrimedDistillTrainer(args=make_primed_args(**settings), priming=PrimingTemplate(priming), **given)

    make.kind = request.param
    return make


ROWS = [
    [{"prompt": "the <chat> cat", "completion": " sat"}, {"prompt": "the cat", "completion": " sat"}],
    [{"prompt": "the cat", "completion": " sat"}, {"prompt": "the cat", "completion": " sat <chat> sat"}],
]
PLAIN = [{"prompt": "the cat", "completion": " sat"}] * 2


class TestPadToken:
    @pytest.mark.parametrize(
        ("resized", "role"), [((), "student"), (("student",), "teacher"), (("teacher",), "student")]
    )
    def test_added_without_resizing_a_model_is_refused(self, make_trainer, resized, role):
        model = {"student": "`model", "teacher": "`teacher_model"}[role]
        message = rf"pad token is '\[PAD\]' with id 30, but the {role} has embeddings for the ids below 30.*{model}.resize_token"
        with pytest.raises(ValueError, match=message):
            make_trainer(extended(pad_token="[PAD]"), resized)

    def test_added_and_both_resized_trains(self, make_trainer):
        trainer = make_trainer(extended(pad_token="[PAD]"), ("student", "teacher"))
        trainer.train()
        assert math.isfinite(trainer.state.log_history[0]["loss"])

    def test_an_end_of_text_token_that_was_added(self, make_trainer):
        tokenizer = extended(eos_token="<end>")
        tokenizer.pad_token = "<pad>"
        with pytest.raises(ValueError, match="eos token is '<end>' with id 30, but the student"):
            make_trainer(tokenizer)


class TestRows:
    @pytest.mark.parametrize("rows", ROWS)
    @pytest.mark.parametrize(
        ("resized", "role"), [((), "student"), (("student",), "teacher"), (("teacher",), "student")]
    )
    def test_with_a_token_that_a_model_does_not_embed_are_refused(self, make_trainer, rows, resized, role):
        message = f"A row of `train_dataset` holds the token '<chat>' with id 30, but the {role} has embeddings for"
        with pytest.raises(ValueError, match=message):
            make_trainer(extended(), resized, rows)

    @pytest.mark.parametrize("rows", ROWS)
    def test_for_evaluation(self, make_trainer, rows):
        with pytest.raises(ValueError, match="A row of `eval_dataset` holds the token '<chat>' with id 30"):
            make_trainer(extended(), rows=PLAIN, eval_rows=rows)
        trainer = make_trainer(extended(), rows=PLAIN)
        for evaluate, name in ((trainer.evaluate, "eval_dataset"), (trainer.predict, "test_dataset")):
            with pytest.raises(ValueError, match=f"A row of `{name}` holds the token '<chat>'"):
                evaluate(Dataset.from_list(rows))
            with pytest.raises(ValueError, match=rf"A row of `{name}\['x'\]` holds the token '<chat>'"):
                evaluate({"x": Dataset.from_list(rows)})

    @pytest.mark.parametrize("rows", ROWS)
    def test_of_a_stream_are_refused_as_they_come(self, make_trainer, rows):
        trainer = make_trainer(extended(), rows=Dataset.from_list(rows).to_iterable_dataset())
        with pytest.raises(ValueError, match="A row of `train_dataset` holds the token '<chat>' with id 30"):
            trainer.train()
        make_trainer(extended(), rows=Dataset.from_list(PLAIN).to_iterable_dataset()).train()

    def test_a_priming_text_with_such_a_token(self, make_trainer):
        if make_trainer.kind == "promptkd":
            pytest.skip("has none")
        make_trainer(extended(), ("teacher",), PLAIN, priming="<chat> ").train()
        with pytest.raises(ValueError, match="holds the token '<chat>' with id 30, but the teacher"):
            make_trainer(extended(), (), PLAIN, priming="<chat> ")

    def test_a_token_that_never_occurs_is_no_obstacle(self, make_trainer):
        """As the image token of Gemma 3, whose text models do not have it."""
        trainer = make_trainer(extended(), rows=PLAIN, eval_rows=PLAIN)
        trainer.train()
        assert math.isfinite(trainer.evaluate()["eval_loss"])

    @pytest.mark.parametrize("rows", ROWS)
    def test_after_resizing_both_train(self, make_trainer, rows):
        trainer = make_trainer(extended(), ("student", "teacher"), rows, eval_rows=rows)
        trainer.train()
        assert math.isfinite(trainer.evaluate()["eval_loss"])


class TestCacheBuilder:
    @pytest.mark.parametrize("rows", ROWS)
    def test_refuses_them_too(self, rows, tmp_path):
        with pytest.raises(
            ValueError, match="A row of `dataset` holds the token '<chat>' with id 30, but the teacher"
        ):
            build_teacher_cache(small(2), Dataset.from_list(rows), str(tmp_path / "cache"), extended())
        assert not (tmp_path / "cache").exists()
