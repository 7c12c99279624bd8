"""The output head of a teacher that runs elsewhere: loaded alone, it makes the logits that the whole model makes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, HEADS, OTHERS, tiny_model, tiny_multimodal_model
from transformers import AutoModelForCausalLM

from trl_promptkd.models import output_head
from trl_promptkd.models.forward import TokenStates, completion_states
from trl_promptkd.models.output_head import load_output_head


NO_DECODER = ("mamba", "rwkv")  # transformers names none; these are refused wherever hidden states are needed
IDS = torch.tensor([[3, 9, 14, 22, 7, 31, 5]])


def states_and_logits(model):
    known = completion_states(model, IDS, torch.ones_like(IDS), IDS)
    return known.hidden_states, known.logits()


def loaded_names(model):
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.is_meta]


@torch.no_grad()
def check_same_logits(model, folder, **saved):
    model.save_pretrained(folder, **saved)
    head = load_output_head(str(folder))
    states, expected = states_and_logits(model)
    assert torch.equal(TokenStates(states, head).logits(), expected)
    return head


class TestLogits:
    @pytest.mark.parametrize("family", [*CONFIGS, *HEADS, *(name for name in OTHERS if name not in NO_DECODER)])
    @pytest.mark.parametrize("tied", [True, False])
    def test_are_the_models_own(self, family, tied, tmp_path):
        head = check_same_logits(tiny_model(family, tie_word_embeddings=tied), tmp_path)
        assert any(parameter.is_meta for parameter in head.parameters())

    @pytest.mark.parametrize("family", ["gemma3", "llava"])
    def test_are_those_of_a_model_of_images_and_texts(self, family, tmp_path):
        check_same_logits(tiny_multimodal_model(family), tmp_path)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_have_the_checkpoints_dtype(self, dtype, tmp_path):
        head = check_same_logits(tiny_model(dtype=dtype), tmp_path)
        assert head.lm_head.weight.dtype == dtype

    def test_are_in_another_dtype_if_told_so(self, tmp_path):
        tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
        head = load_output_head(str(tmp_path), {"dtype": "float32"})
        live = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        states, expected = states_and_logits(live)
        assert torch.equal(TokenStates(states, head).logits(), expected)


class TestWhatIsLoaded:
    @pytest.mark.parametrize(
        ("tied", "names"), [(True, ["model.embed_tokens.weight", "lm_head.weight"]), (False, ["lm_head.weight"])]
    )
    def test_is_the_head_alone(self, tied, names, tmp_path):
        tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
        assert loaded_names(load_output_head(str(tmp_path))) == names

    def test_is_read_from_its_own_shards_alone(self, tmp_path, monkeypatch):
        tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path, max_shard_size="6KB")
        shard = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
        for path in tmp_path.glob("*.safetensors"):
            if path.name != shard:
                path.unlink()
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
        asked, original = [], output_head.cached_file
        monkeypatch.setattr(
            output_head, "cached_file", lambda *args, **kw: asked.append(args[1]) or original(*args, **kw)
        )
        assert loaded_names(load_output_head(str(tmp_path))) == ["lm_head.weight"]
        assert asked == ["model.safetensors.index.json", shard]

    def test_keeps_what_ends_a_text(self, tmp_path):
        model = tiny_model()
        model.generation_config.eos_token_id = [0, 3]
        model.save_pretrained(tmp_path)
        assert load_output_head(str(tmp_path)).generation_config.eos_token_id == [0, 3]

    def test_is_found_in_a_checkpoint_with_other_beginnings(self, tmp_path):
        model = tiny_model("gpt2")
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        save_file({key.removeprefix("transformer."): value for key, value in load_file(file).items()}, file)
        states, expected = states_and_logits(model)
        assert torch.equal(TokenStates(states, load_output_head(str(tmp_path))).logits(), expected)

    def test_is_not_quantized_if_the_checkpoint_is(self, tmp_path):
        model = tiny_model(tie_word_embeddings=False)
        model.config.quantization_config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        check_same_logits(model, tmp_path)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("lm_head.weight"), "holds no weight 'lm_head.weight'"),
            (
                lambda t: t.update({"lm_head.weight": torch.zeros(4, 4)}),
                r"is F32 of shape \[4, 4\], but .* \[40, 32\]",
            ),
            (
                lambda t: t.update({"lm_head.weight": torch.zeros(40, 32, dtype=torch.uint8)}),
                "is U8 of shape .* If the head is quantized",
            ),
        ],
    )
    def test_a_head_that_is_not_there(self, change, message, tmp_path):
        tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_output_head(str(tmp_path))

    def test_a_file_that_is_cut(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(OSError, match=r"Check the name, or|could not be loaded"):
            load_output_head(str(tmp_path))

    def test_arguments_without_effect(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds 'device_map', which has no effect"):
            load_output_head(str(tmp_path), {"device_map": "auto"})

    def test_a_folder_that_is_not_there(self):
        with pytest.raises(OSError, match="'no/such' could not be loaded"):
            load_output_head("no/such")
