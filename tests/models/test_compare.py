import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny import CONFIGS, EXPERTS, tiny_model, tiny_multimodal_model, tiny_tokenizer
from transformers import TrainingArguments

from trl_promptkd.models.compare import ALONE, PADDED, PADDING_FREE, check_forward, distances_from_own_forward


ROWS = [{"prompt_ids": [7, 8, 9], "completion_ids": [10, 11, 12]}, {"prompt_ids": [13], "completion_ids": [14]}]
GOOD = [*CONFIGS, *EXPERTS, "mamba", "falcon", "llama4", "modernbert"]
LEAKING = ["opt", "mamba", "bloom"]  # a mask that ignores positions, a state, distances
if not hasattr(TrainingArguments, "activation_checkpointing"):  # an older transformers
    LEAKING.append("falcon")


def check(model, role="student", soft_prompt=None, padding_free=False):
    check_forward(role, model, tiny_tokenizer(), Accelerator(cpu=True), soft_prompt, 40, padding_free)


def soft_prompt():
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


class TestDistances:
    @pytest.mark.parametrize("prompted", [False, True])
    @pytest.mark.parametrize("family", GOOD)
    def test_are_rounding_for_models_that_can_be_trained(self, family, prompted):
        found = distances_from_own_forward(tiny_model(family), ROWS, 0, soft_prompt() if prompted else None)
        assert max(off.log_probs for off in found.values()) < 1e-4

    @pytest.mark.parametrize("prompted", [False, True])
    @pytest.mark.parametrize("family", ["gemma3", "llava"])
    def test_are_rounding_for_the_text_of_multimodal_models(self, family, prompted):
        found = distances_from_own_forward(tiny_multimodal_model(family), ROWS, 0, soft_prompt() if prompted else None)
        assert max(off.log_probs for off in found.values()) < 1e-4

    @pytest.mark.parametrize("family", [family for family in [*GOOD, "gemma4", "qwen3"] if family not in LEAKING])
    def test_are_rounding_for_models_that_keep_rows_apart(self, family):
        found = distances_from_own_forward(tiny_model(family), ROWS, 0, padding_free=True)
        assert found[PADDING_FREE].log_probs < 1e-4

    @pytest.mark.parametrize("family", LEAKING)
    def test_tell_rows_that_see_each_other(self, family):
        found = distances_from_own_forward(tiny_model(family), ROWS, 0, padding_free=True)
        assert found[PADDED].log_probs < 1e-4
        assert found[PADDING_FREE].log_probs > 0.1

    def test_tell_the_head_from_the_padding(self):
        found = distances_from_own_forward(tiny_model("rwkv"), ROWS, 0)
        assert found[ALONE].log_probs < 1e-4
        assert found[PADDED].log_probs > 0.1


class TestCheckForward:
    def test_a_state_that_ignores_the_mask_is_refused(self):
        with pytest.raises(
            ValueError, match=r"student \(RwkvForCausalLM\) gives a padded row other logits than the row"
        ):
            check(tiny_model("rwkv"))

    def test_embeddings_that_need_ids_refuse_a_soft_prompt(self):
        model = tiny_model("gemma4")
        check(model, "teacher")
        with pytest.raises(ValueError, match=r"prompted teacher \(Gemma4ForCausalLM\) cannot .*from `inputs_embeds`"):
            check(model, "prompted teacher", soft_prompt())

    def test_something_after_the_head_is_refused(self):
        model = tiny_model()
        own = model.forward

        def squared(*args, **kwargs):
            output = own(*args, **kwargs)
            output.logits = output.logits.square()
            return output

        model.forward = squared
        with pytest.raises(ValueError, match="are not its output head applied to its last hidden state"):
            check(model)

    @pytest.mark.parametrize("family", LEAKING)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_that_see_each_other_are_refused_without_padding(self, family, dtype):
        model = tiny_model(family, dtype=dtype)
        check(model)
        with pytest.raises(
            ValueError, match=r"student \(\w+\) gives rows that stand end to end .*`padding_free=False`"
        ):
            check(model, padding_free=True)

    def test_a_model_that_needs_a_mask_is_refused_without_padding(self):
        model = tiny_model()
        decoder = model.get_decoder()
        own = decoder.forward

        def counts_tokens(input_ids, attention_mask=None, **kwargs):
            mask = torch.ones_like(input_ids) if kwargs.get("position_ids") is None else attention_mask
            return own(input_ids=input_ids, attention_mask=mask.long(), **kwargs)

        decoder.forward = counts_tokens
        check(model)
        with pytest.raises(ValueError, match=r"student .* cannot be run .*, or set `padding_free=False`"):
            check(model, padding_free=True)

    def test_what_was_not_measured_is_warned_about(self, caplog, propagate):
        model = tiny_model("mamba")
        model.lm_head.to("meta")
        check(model)
        assert not caplog.records
        check(model, padding_free=True)
        assert "whether the student (MambaForCausalLM) keeps rows apart was not measured" in caplog.text

    def test_rounding_is_no_fault(self):
        for model in (tiny_model(dtype=torch.bfloat16), tiny_model("mixtral", dtype=torch.bfloat16)):
            check(model, padding_free=True)
            check(model, soft_prompt=soft_prompt())

    def test_modes_and_random_state_stay(self):
        model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5)).train()
        before = torch.get_rng_state()
        check(model)
        assert all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), before)
