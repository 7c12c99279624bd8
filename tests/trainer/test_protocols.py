"""Live, cached and served teachers, one or several, and both rollouts: the trainers use them in the same way."""

import inspect

import pytest

from trl_promptkd.generation.rollouts import Rollouts
from trl_promptkd.generation.vllm import VLLMRollouts
from trl_promptkd.models.forward import TokenLogits, TokenStates
from trl_promptkd.models.joined_logits import JoinedLogits
from trl_promptkd.teacher_cache.reader import CachedAnswers
from trl_promptkd.trainer import primed_distill_trainer, promptkd_step, promptkd_trainer
from trl_promptkd.trainer.api_teacher import ApiTeacher
from trl_promptkd.trainer.primed_teacher import CachedTeacher, LiveTeacher
from trl_promptkd.trainer.served_teacher import ServedTeacher
from trl_promptkd.trainer.several_teachers import SeveralTeachers


def methods(cls: type) -> dict[str, list[str]]:
    """The public methods of a class and `__len__`, with the names of their parameters."""
    found = inspect.getmembers(cls, inspect.isfunction)
    return {name: list(inspect.signature(f).parameters) for name, f in found if name == "__len__" or name[0] != "_"}


def test_both_rollouts_have_the_same_two_methods():
    assert methods(Rollouts) == methods(VLLMRollouts)
    assert sorted(methods(Rollouts)) == ["sample", "sync"]


@pytest.mark.parametrize("cls", [TokenStates, CachedAnswers, JoinedLogits])
def test_what_a_teacher_says_follows_the_protocol(cls):
    assert methods(TokenLogits).items() <= methods(cls).items()


@pytest.mark.parametrize("cls", [CachedTeacher, ServedTeacher])
def test_a_cached_or_served_teacher_has_the_methods_of_a_live_one(cls):
    theirs = methods(cls)
    assert theirs.items() <= methods(LiveTeacher).items()
    told = {"find", "load", "views", "place", "answered", "expect", "at_completions", "plain_log_prob"}
    assert told == theirs.keys()


@pytest.mark.parametrize("cls", [ApiTeacher, SeveralTeachers])
def test_other_teachers_have_the_methods_of_a_cached_one(cls):
    assert methods(CachedTeacher).items() <= methods(cls).items()


@pytest.mark.parametrize("module", [primed_distill_trainer, promptkd_step, promptkd_trainer])
def test_the_trainers_never_look_at_which_it_is(module):
    source = inspect.getsource(module)
    names = ("LiveTeacher", "CachedTeacher", "ServedTeacher", "ApiTeacher", "SeveralTeachers")
    for name in (*names, "VLLMRollouts", "use_vllm", "partial("):
        assert name not in source, name
