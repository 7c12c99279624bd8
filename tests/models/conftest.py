"""A trainer of either kind, for what both do alike."""

import pytest
from tiny import answered_dataset
from trainers import Maker


@pytest.fixture(params=["promptkd", "primed"])
def make_trainer(request, tmp_path):
    """A function of models, a trainer's arguments and its settings; PromptKD, too, takes `response_source`."""
    maker = Maker(request.param, tmp_path)

    def make(model=None, teacher_model=None, **settings):
        if request.param == "promptkd":
            settings["lmbda"] = 1.0 if settings.pop("response_source", "dataset") == "student" else 0.0
        return maker(model, teacher_model, **{"train_dataset": answered_dataset(), **settings})

    make.kind = request.param
    return make
