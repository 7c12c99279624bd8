"""What surrounds vLLM, with a stand-in for it. With vLLM itself: test_vllm.py."""

import contextlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny import answered_dataset, difference, prompt_dataset, tiny_model, tiny_tokenizer, weights
from transformers import GenerationConfig

from trl_promptkd import PrimedDistillTrainer, PromptEncoderConfig, PromptKDTrainer
from trl_promptkd.generation import vllm as vllm_rollouts
from trl_promptkd.generation.vllm import VLLMRollouts, _base_weights_stay
from trl_promptkd.trainer.promptkd_config import PromptKDConfig


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


def rollouts(make_args, generation_config=None, vocab_size=40, **kwargs):
    args = make_args(use_vllm=True, **kwargs)
    return VLLMRollouts(
        tiny_model(), Accelerator(cpu=True), tiny_tokenizer(), generation_config or settings(), args, vocab_size
    )


class TestSettings:
    def test_what_vllm_is_told(self, stand_in, make_args):
        told = rollouts(make_args, vocab_size=30, gradient_accumulation_steps=3).generation.kwargs
        assert (told["temperature"], told["top_k"], told["top_p"], told["max_completion_length"]) == (0.7, 3, 1.0, 8)
        assert told["max_num_seqs"] == 6
        assert told["generation_kwargs"] == {
            "stop_token_ids": [0, 2],
            "logit_bias": dict.fromkeys(range(30, 40), -100.0),
        }

    def test_one_end_of_text_as_a_number(self, stand_in, make_args):
        assert rollouts(make_args, settings(eos_token_id=5)).generation.kwargs["generation_kwargs"] == {
            "stop_token_ids": [5]
        }

    def test_greedy_is_temperature_zero(self, stand_in, make_args):
        told = rollouts(make_args, settings(do_sample=False, temperature=None, top_k=None)).generation.kwargs
        assert told["temperature"] == 0.0

    def test_a_setting_by_another_name(self, stand_in, make_args):
        told = rollouts(make_args, generation_kwargs={"min_new_tokens": 2, "do_sample": True}).generation.kwargs
        assert told["generation_kwargs"] == {"min_tokens": 2, "stop_token_ids": [0, 2]}

    def test_stop_strings_by_vllms_name(self, stand_in, make_args):
        told = rollouts(make_args, generation_kwargs={"stop_strings": ["cat"]}).generation.kwargs
        assert told["generation_kwargs"] == {"stop": ["cat"], "stop_token_ids": [0, 2]}

    def test_an_unknown_setting_is_refused(self, stand_in, make_args):
        with pytest.raises(ValueError, match="'num_beams', which is not known to be the same in vLLM"):
            rollouts(make_args, generation_kwargs={"num_beams": 2})

    def test_a_server_needs_a_gpu(self, stand_in, make_args):
        with pytest.raises(ValueError, match="weights can only be sent to a server from a GPU"):
            rollouts(make_args, vllm_mode="server")

    def test_an_unknown_mode(self):
        with pytest.raises(ValueError, match="`vllm_mode` is 'remote'; it must be 'colocate' or 'server'"):
            PromptKDConfig(output_dir="x", vllm_mode="remote", use_cpu=True, bf16=False)


class TestSamples:
    def test_end_with_the_first_stop_token_and_keep_their_order(self, stand_in, make_args):
        assert rollouts(make_args).sample(None, [[7, 8], [9], [2]], step=1) == [[8, 0], [9, 0], [2]]

    def test_no_prompts_no_call(self, stand_in, make_args):
        ours = rollouts(make_args)
        assert ours.sample(None, [], step=1) == []
        assert ours.generation.asked == []

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
        assert all(
            a != b for a, b in zip(first, other, strict=True)
        )  # torch's, and numpy's, from which vLLM takes seeds on a GPU

    @pytest.mark.parametrize("prompts", [[[7, 8]], []])
    def test_where_engines_sample_together_every_rank_brings_as_many_prompts(self, stand_in, make_args, prompts):
        ours = rollouts(make_args)
        ours.generation.tensor_parallel_size = 2
        ours.accelerator = SimpleNamespace(
            gather=lambda count: torch.tensor([3, int(count)]), device=torch.device("cpu")
        )
        assert ours.sample(None, prompts, step=1) == [[8, 0]] * len(prompts)
        assert [len(asked) for asked, _ in ours.generation.asked] == [3]
        ours.accelerator.gather = lambda count: torch.tensor([0, 0])
        assert ours.sample(None, [], step=1) == []

    def test_a_quantized_students_adapter_is_refused(self, stand_in, make_args):
        student = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
        student.get_base_model().quantization_method = "bitsandbytes"
        args = make_args(use_vllm=True)
        with pytest.raises(ValueError, match="the student is quantized: its adapter cannot be merged"):
            VLLMRollouts(student, Accelerator(cpu=True), tiny_tokenizer(), settings(), args, 40)


class TestBaseWeights:
    @pytest.mark.parametrize("fails", [False, True])
    def test_stay_bitwise_through_merging(self, fails):
        student = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
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


def named(model):
    model.name_or_path = "somewhere"
    model.config._name_or_path = "somewhere"
    return model


class TestTrainers:
    def test_promptkd_samples_with_it_and_syncs_before_every_window_and_evaluation(self, stand_in, make_args):
        trainer = PromptKDTrainer(
            named(tiny_model()),
            tiny_model(seed=1),
            make_args(use_vllm=True, max_steps=3, gradient_accumulation_steps=2),
            train_dataset=prompt_dataset(12),
            eval_dataset=answered_dataset(2),
            processing_class=tiny_tokenizer(),
            prompt_encoder_config=PromptEncoderConfig(prompt_init_text="you are a student ."),
        )
        trainer.train()
        assert trainer.rollouts.generation.synced == 3
        assert [len(prompts) for prompts, _ in trainer.rollouts.generation.asked] == [4, 4, 4]
        assert trainer.state.log_history[0]["rollout/mean_length"] == 2
        trainer.evaluate()
        assert trainer.rollouts.generation.synced == 4
        assert len(trainer.rollouts.generation.asked) == 4

    def test_primed_distillation_too(self, stand_in, make_primed_args):
        trainer = PrimedDistillTrainer(
            named(tiny_model()),
            make_primed_args(use_vllm=True, max_steps=2, response_source="student"),
            train_dataset=prompt_dataset(8),
            processing_class=tiny_tokenizer(),
            teacher_model=tiny_model(seed=1),
        )
        trainer.train()
        assert trainer.rollouts.generation.synced == 2
        assert len(trainer.rollouts.generation.asked) == 2

    def test_refused_before_weights_are_loaded(self, make_args, make_primed_args, monkeypatch):
        def build(model="no/such/model", **kwargs):
            PromptKDTrainer(
                model, "no/such/teacher", make_args(use_vllm=True, **kwargs), train_dataset=prompt_dataset()
            )

        monkeypatch.setattr(vllm_rollouts, "is_vllm_available", lambda: False)
        with pytest.raises(ImportError, match=r"vLLM is not installed\..*pip install trl"):
            build()
        monkeypatch.setattr(vllm_rollouts, "is_vllm_available", lambda: True)
        with pytest.raises(ValueError, match="`use_vllm` is True, but the student samples nothing"):
            build(lmbda=0.0)
        with pytest.raises(ValueError, match="`model` has no name that vLLM could load it by"):
            build(tiny_model())
        with pytest.raises(ValueError, match="`use_vllm` is True, but the student samples nothing"):
            PrimedDistillTrainer("no/such/model", make_primed_args(use_vllm=True), train_dataset=answered_dataset())
