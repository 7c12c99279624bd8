"""A trainer of either kind, for what both do alike."""

import pytest
from tiny import answered_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import PrimedDistillTrainer, PrimingTemplate, PromptEncoderConfig, PromptKDTrainer


ARGUMENTS = ("processing_class", "train_dataset", "eval_dataset", "peft_config", "callbacks")


@pytest.fixture(params=["promptkd", "primed"])
def make_trainer(request, make_args, make_primed_args):
    """A function of models, a trainer's arguments and its settings; PromptKD, too, takes `response_source`."""

    def make(model=None, teacher_model=None, priming="red ", **settings):
        given = {"train_dataset": answered_dataset(), "processing_class": tiny_tokenizer()}
        given |= {name: settings.pop(name) for name in ARGUMENTS if name in settings}
        given |= {"model": tiny_model(seed=1) if model is None else model, "teacher_model": teacher_model}
        if request.param == "primed":
            return PrimedDistillTrainer(args=make_primed_args(**settings), priming=PrimingTemplate(priming), **given)
        lmbda = 1.0 if settings.pop("response_source", "dataset") == "student" else 0.0
        prompt = PromptEncoderConfig(prompt_init_text="suppose you are a student .")
        return PromptKDTrainer(args=make_args(lmbda=lmbda, **settings), prompt_encoder_config=prompt, **given)

    make.kind = request.param
    return make
