"""What surrounds vLLM, with a stand-in for it. With vLLM itself: test_vllm.py."""

import contextlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from tiny import answered_dataset, difference, tiny_model, tiny_tokenizer, weights
from trainers import logged, lora
from transformers import GenerationConfig

from trl_promptkd.generation import vllm as vllm_rollouts
from trl_promptkd.generation.vllm import VLLMRollouts, _base_weights_stay


class StandIn:
    """Answers every prompt with its last token, an end of text, and something behind it."""

    tensor_parallel_size = 1

    def __init__(self, **kwargs):
        self.kwargs, self.synced, self.asked = kwargs, 0, []

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations):
        self.asked.append((prompts, (float(torch.rand(())), np.random.rand())))
        return prompts, [(prompt[-1], 0, 9) for prompt in prompts], None, None


@pytest.fixture
def stand_in(monkeypatch):
    module = SimpleNamespace(VLLMGeneration=StandIn, LLM=None)
    monkeypatch.setattr(vllm_rollouts, "vllm_generation_module", lambda: module)
    monkeypatch.setattr(vllm_rollouts, "is_vllm_available", lambda: True)
    monkeypatch.setattr(VLLMRollouts, "sync", lambda self: self.generation.sync_weights())
    return module


def settings(**kwargs):
    return GenerationConfig(
        **{"do_sample": True, "temperature": 0.7, "top_k": 3, "max_new_tokens": 8, "eos_token_id": [0, 2], **kwargs}
    )


def rollouts(make_args, generation_config=None, vocab_size=40, student=None, **kwargs):
    args, config = make_args(use_vllm=True, **kwargs), generation_config or settings()
    return VLLMRollouts(student or tiny_model(), Accelerator(cpu=True), tiny_tokenizer(), config, args, vocab_size)


class TestSettings:
    @pytest.mark.parametrize(
        ("config", "args", "told"),
        [
            ({}, {}, {"temperature": 0.7, "top_k": 3, "top_p": 1.0, "max_completion_length": 8}),
            ({}, {"gradient_accumulation_steps": 3}, {"max_num_seqs": 6}),
            ({"do_sample": False, "temperature": None, "top_k": None}, {}, {"temperature": 0.0}),
        ],
    )
    def test_what_vllm_is_told(self, stand_in, make_args, config, args, told):
        kwargs = rollouts(make_args, settings(**config), **args).generation.kwargs
        assert {name: kwargs[name] for name in told} == told

    @pytest.mark.parametrize(
        ("config", "given", "told"),
        [
            ({}, {"vocab_size": 30}, {"logit_bias": dict.fromkeys(range(30, 40), -100.0)}),
            ({"eos_token_id": 5}, {}, {"stop_token_ids": [5]}),
            ({}, {"generation_kwargs": {"min_new_tokens": 2, "do_sample": True}}, {"min_tokens": 2}),
            ({}, {"generation_kwargs": {"stop_strings": ["cat"]}}, {"stop": ["cat"]}),
        ],
    )
    def test_what_it_is_told_by_its_own_names(self, stand_in, make_args, config, given, told):
        kwargs = rollouts(make_args, settings(**config), **given).generation.kwargs["generation_kwargs"]
        assert kwargs == {"stop_token_ids": [0, 2], **told}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"generation_kwargs": {"num_beams": 2}}, "'num_beams', which is not known to be the same in vLLM"),
            ({"vllm_mode": "server"}, "weights can only be sent to a server from a GPU"),
        ],
    )
    def test_what_it_cannot_do_is_refused(self, stand_in, make_args, given, message):
        with pytest.raises(ValueError, match=message):
            rollouts(make_args, **given)


class TestSamples:
    def test_end_with_the_first_stop_token_and_keep_their_order(self, stand_in, make_args):
        ours = rollouts(make_args)
        assert ours.sample(None, [[7, 8], [9], [2]], step=1) == [[8, 0], [9, 0], [2]]
        assert ours.sample(None, [], step=1) == []
        assert len(ours.generation.asked) == 1  # not for nothing

    def test_the_random_state_is_the_seeds(self, stand_in, make_args):
        ours = rollouts(make_args)
        state = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()
        for step in (1, 1, 2):
            ours.sample(None, [[7]], step)
        assert (np.random.get_state()[1] == state[0]).all()
        assert torch.equal(torch.get_rng_state(), state[1])
        assert random.getstate() == state[2]
        first, second, other = (numbers for _, numbers in ours.generation.asked)
        assert first == second
        # torch's, and numpy's, from which vLLM takes seeds on a GPU
        assert all(a != b for a, b in zip(first, other, strict=True))

    @pytest.mark.parametrize("prompts", [[[7, 8]], []])
    def test_where_engines_sample_together_every_rank_brings_as_many_prompts(self, stand_in, make_args, prompts):
        ours = rollouts(make_args)
        ours.generation.tensor_parallel_size = 2
        ours.accelerator = SimpleNamespace(device=torch.device("cpu"))
        ours.accelerator.gather = lambda count: torch.tensor([3, int(count)])
        assert ours.sample(None, prompts, step=1) == [[8, 0]] * len(prompts)
        assert [len(asked) for asked, _ in ours.generation.asked] == [3]
        ours.accelerator.gather = lambda count: torch.tensor([0, 0])
        assert ours.sample(None, [], step=1) == []

    def test_a_quantized_students_adapter_is_refused(self, stand_in, make_args):
        student = get_peft_model(tiny_model(), lora())
        student.get_base_model().quantization_method = "bitsandbytes"
        with pytest.raises(ValueError, match="the student is quantized: its adapter cannot be merged"):
            rollouts(make_args, student=student)


class TestBaseWeights:
    @pytest.mark.parametrize("fails", [False, True])
    def test_stay_bitwise_through_merging(self, fails):
        student = get_peft_model(tiny_model(), lora(init_lora_weights=False))
        before = weights(student)
        with contextlib.suppress(RuntimeError), _base_weights_stay(student):
            for _ in range(20):
                student.merge_adapter()
                student.unmerge_adapter()
            assert difference(weights(student), before) > 0  # what PEFT's own way leaves
            if fails:
                student.merge_adapter()
                raise RuntimeError("halfway")
        assert difference(weights(student), before) == 0
        assert not any(getattr(module, "merged", False) for module in student.modules())


class TestTrainers:
    def test_sample_with_it_and_sync_before_every_window_and_evaluation(self, stand_in, make):
        student = tiny_model()
        student.name_or_path = student.config._name_or_path = "somewhere"
        source = {"response_source": "student"} if make.method == "primed" else {}
        trainer = make(student, use_vllm=True, max_steps=3, gradient_accumulation_steps=2, **source)
        trainer.train()
        generation = trainer.rollouts.generation
        assert generation.synced == 3
        assert [len(prompts) for prompts, _ in generation.asked] == [4, 4, 4]
        assert logged(trainer, "rollout/mean_length")[0] == 2
        trainer.evaluate(answered_dataset(2))
        assert generation.synced == 4
        assert len(generation.asked) == 4

    def test_refused_before_weights_are_loaded(self, promptkd, primed, monkeypatch):
        names = ("no/such/model", "no/such/teacher")
        monkeypatch.setattr(vllm_rollouts, "is_vllm_available", lambda: False)
        with pytest.raises(ImportError, match=r'vLLM is not installed\..*pip install "trl_promptkd\[vllm\]"'):
            promptkd(*names, use_vllm=True)
        monkeypatch.setattr(vllm_rollouts, "is_vllm_available", lambda: True)
        for make, settings in ((promptkd, {"lmbda": 0.0}), (primed, {})):
            with pytest.raises(ValueError, match="`use_vllm` is True, but the student samples nothing"):
                make(*names, use_vllm=True, **settings)
        with pytest.raises(ValueError, match="`model` has no name that vLLM could load it by"):
            promptkd(tiny_model(), names[1], use_vllm=True)
