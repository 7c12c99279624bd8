import math

import pytest
from datasets import Dataset
from tiny import WORDS, tiny_model, tiny_tokenizer

from trl_promptkd import PrimingTemplate, build_teacher_cache
from trl_promptkd.models.limits import position_limit


SIZE = 30  # the tiny tokenizer's tokens
IN_PROMPT = [{"prompt": "the <chat> cat", "completion": " sat"}, {"prompt": "the cat", "completion": " sat"}]
IN_ANSWER = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "the cat", "completion": " sat <chat> sat"}]
PLAIN = [{"prompt": "the cat", "completion": " sat"}] * 2
TOO_SMALL = [((), "student"), (("student",), "teacher"), (("teacher",), "student")]  # resized models, and who is not


def extended(**special):
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.add_special_tokens(special or {"additional_special_tokens": ["<chat>"]})
    assert len(tokenizer) == SIZE + 1
    return tokenizer


def small(role, resized=()):
    model = tiny_model(seed=1 if role == "student" else 2, vocab_size=SIZE)
    if role in resized:
        model.resize_token_embeddings(SIZE + 1)
    return model


@pytest.fixture
def make(make_trainer):
    def make(tokenizer=None, resized=(), rows=None, eval_rows=None, stream=False, **settings):
        data = {"train_dataset": rows, "eval_dataset": eval_rows}
        data = {name: Dataset.from_list(rows) for name, rows in data.items() if rows is not None}
        if stream:
            data["train_dataset"] = data["train_dataset"].to_iterable_dataset()
        models = small("student", resized), small("teacher", resized)
        return make_trainer(*models, processing_class=tokenizer or extended(), **data, **settings)

    make.kind = make_trainer.kind
    return make


class TestSpecialTokens:
    @pytest.mark.parametrize(("resized", "role"), TOO_SMALL)
    def test_a_pad_token_without_resizing_a_model_is_refused(self, make, resized, role):
        model = {"student": "`model", "teacher": "`teacher_model"}[role]
        message = (
            rf"pad token is '\[PAD\]' with id 30, but the {role} has embeddings for the ids below 30.*{model}.res"
        )
        with pytest.raises(ValueError, match=message):
            make(extended(pad_token="[PAD]"), resized)

    def test_a_pad_token_and_both_resized_trains(self, make):
        trainer = make(extended(pad_token="[PAD]"), ("student", "teacher"))
        trainer.train()
        assert math.isfinite(trainer.state.log_history[0]["loss"])

    def test_an_end_of_text_token_that_was_added(self, make):
        tokenizer = extended(eos_token="<end>")
        tokenizer.pad_token = "<pad>"
        with pytest.raises(ValueError, match="eos token is '<end>' with id 30, but the student"):
            make(tokenizer)


@pytest.mark.parametrize("rows", [IN_PROMPT, IN_ANSWER])
class TestRows:
    @pytest.mark.parametrize(("resized", "role"), TOO_SMALL)
    def test_with_a_token_that_a_model_does_not_embed_are_refused(self, make, rows, resized, role):
        message = f"A row of `train_dataset` holds the token '<chat>' with id 30, but the {role} has embeddings for"
        with pytest.raises(ValueError, match=message):
            make(resized=resized, rows=rows)

    def test_for_evaluation(self, make, rows):
        with pytest.raises(ValueError, match="A row of `eval_dataset` holds the token '<chat>' with id 30"):
            make(rows=PLAIN, eval_rows=rows)
        trainer = make(rows=PLAIN)
        for evaluate, name in ((trainer.evaluate, "eval_dataset"), (trainer.predict, "test_dataset")):
            with pytest.raises(ValueError, match=f"A row of `{name}` holds the token '<chat>'"):
                evaluate(Dataset.from_list(rows))
            with pytest.raises(ValueError, match=rf"A row of `{name}\['x'\]` holds the token '<chat>'"):
                evaluate({"x": Dataset.from_list(rows)})

    def test_of_a_stream_are_refused_as_they_come(self, make, rows):
        with pytest.raises(ValueError, match="A row of `train_dataset` holds the token '<chat>' with id 30"):
            make(rows=rows, stream=True).train()
        make(rows=PLAIN, stream=True).train()

    def test_after_resizing_both_train(self, make, rows):
        trainer = make(resized=("student", "teacher"), rows=rows, eval_rows=rows)
        trainer.train()
        assert math.isfinite(trainer.evaluate()["eval_loss"])

    def test_a_teacher_cache_refuses_them_too(self, rows, tmp_path):
        message = "A row of `dataset` holds the token '<chat>' with id 30, but the teacher"
        with pytest.raises(ValueError, match=message):
            build_teacher_cache(small("teacher"), Dataset.from_list(rows), str(tmp_path / "cache"), extended())
        assert not (tmp_path / "cache").exists()


def test_a_priming_text_with_such_a_token(make):
    if make.kind == "promptkd":
        pytest.skip("has none")
    make(resized=("teacher",), rows=PLAIN, priming=PrimingTemplate("<chat> ")).train()
    with pytest.raises(ValueError, match="holds the token '<chat>' with id 30, but the teacher"):
        make(rows=PLAIN, priming=PrimingTemplate("<chat> "))


def test_a_token_that_never_occurs_is_no_obstacle(make):
    """As the image token of Gemma 3, whose text models do not have it."""
    trainer = make(rows=PLAIN, eval_rows=PLAIN)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(("family", "limit"), [("gpt2", 128), ("opt", 128), ("llama", None), ("gpt_neox", None)])
def test_position_limit(family, limit):
    assert position_limit(tiny_model(family)) == limit
