import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny import CONFIGS, EXPERTS, tiny_model, tiny_multimodal_model, tiny_tokenizer

from trl_promptkd.models.compare import ALONE, PADDED, check_forward, distances_from_own_forward


ROWS = [{"prompt_ids": [7, 8, 9], "completion_ids": [10, 11, 12]}, {"prompt_ids": [13], "completion_ids": [14]}]
GOOD = [*CONFIGS, *EXPERTS, "mamba", "falcon", "llama4", "modernbert"]


def check(model, role="student", soft_prompt=None):
    check_forward(role, model, tiny_tokenizer(), Accelerator(cpu=True), soft_prompt, 40)


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

    def test_rounding_is_no_fault(self):
        for model in (tiny_model(dtype=torch.bfloat16), tiny_model("mixtral", dtype=torch.bfloat16)):
            check(model)
            check(model, soft_prompt=soft_prompt())

    def test_modes_and_random_state_stay(self):
        model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5)).train()
        before = torch.get_rng_state()
        check(model)
        assert all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), before)
