import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import WORDS, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trl_promptkd import PromptKDTrainer
from trl_promptkd.models.init_kwargs import check_init_kwargs
from trl_promptkd.models.teacher import disable_dropout, freeze, load_teacher, recomputed_activations
from trl_promptkd.models.tokenizer import check_same_tokenizer, load_teacher_tokenizer, shared_vocab_size
from trl_promptkd.trainer.checks import check_found


@pytest.fixture
def base(tmp_path):
    """A folder with a tiny model, and one beside it with an adapter of it."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    return tmp_path / "base"


def test_a_quantized_checkpoint_takes_a_dict_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "whole")
    quantization = {"quantization_config": {"load_in_4bit": True}}
    load_teacher(str(tmp_path / "whole"), quantization).save_pretrained(tmp_path / "quantized")
    assert load_teacher(str(tmp_path / "quantized"), quantization).is_loaded_in_4bit


class TestTokenizers:
    def test_equal_ones_pass(self):
        check_same_tokenizer(tiny_tokenizer(), tiny_tokenizer())

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                [*WORDS[:3], "an", "pupil", *WORDS[5:]],
                r"id 9, which is 'a' for the student .* and 'an' for the teacher",
            ),
            (WORDS[:-1], f"'{WORDS[-1]}' for the student .* and None for the teacher"),
        ],
    )
    def test_the_first_token_that_differs_or_is_missing_is_named(self, words, message):
        with pytest.raises(ValueError, match=message):
            check_same_tokenizer(tiny_tokenizer(WORDS), tiny_tokenizer(words))

    @pytest.mark.parametrize("name", ["base", "lora"])
    def test_a_folders_own_or_that_of_the_model_below_an_adapter(self, base, name):
        folder = str(base.parent / name)
        assert load_teacher_tokenizer(folder) is None
        assert load_teacher_tokenizer("") is None
        tiny_tokenizer().save_pretrained(base)
        assert load_teacher_tokenizer(folder).get_vocab() == tiny_tokenizer().get_vocab()


class TestSharedVocabSize:
    @pytest.mark.parametrize(
        ("student", "teacher", "words", "size"),
        [
            (40, 40, None, 40),  # one size: everything
            (48, 48, WORDS, 30),  # padding: the real ids
            (40, 64, None, 40),
        ],
    )
    def test_counts_the_real_ids(self, student, teacher, words, size):
        models = tiny_model(vocab_size=student), tiny_model(vocab_size=teacher)
        assert shared_vocab_size(*models, tiny_tokenizer(words)) == size

    @pytest.mark.parametrize("teacher", [40, 64])
    def test_special_tokens_beyond_both_vocabularies_are_no_obstacle(self, teacher):
        tokenizer = tiny_tokenizer()  # as Gemma 3's text models, whose tokenizer knows an image token
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        assert len(tokenizer) == 41
        assert shared_vocab_size(tiny_model(), tiny_model(vocab_size=teacher), tokenizer) == 40


class TestLoading:
    @pytest.mark.parametrize(
        ("init_kwargs", "dtype"),
        [
            (None, torch.float32),
            ({"dtype": "bfloat16"}, torch.bfloat16),
            ({"dtype": "auto"}, torch.float32),
            ({"attn_implementation": "eager"}, torch.float32),  # no dtype: a KeyError in GKDTrainer
        ],
    )
    def test_init_kwargs_with_and_without_dtype(self, base, init_kwargs, dtype):
        given = copy.deepcopy(init_kwargs)
        assert load_teacher(str(base), init_kwargs).dtype == dtype
        assert init_kwargs == given

    def test_a_quantization_config_may_be_a_dict(self, tmp_path):
        pytest.importorskip("bitsandbytes")
        tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
        teacher = load_teacher(str(tmp_path), {"quantization_config": {"load_in_4bit": True}})
        assert teacher.is_loaded_in_4bit

    def test_what_bitsandbytes_writes_of_itself_is_taken(self):
        settings = BitsAndBytesConfig(load_in_4bit=True).to_dict()
        check_init_kwargs("teacher_model_init_kwargs", {"quantization_config": settings})

    def test_an_adapters_folder_is_found(self, base):
        check_found("teacher_model", str(base.parent / "lora"), None, False)
        assert isinstance(load_teacher(str(base.parent / "lora")), PreTrainedModel)
        with pytest.raises(OSError, match="`teacher_model` is 'no/such-model', which cannot be loaded"):
            check_found("teacher_model", "no/such-model", {"local_files_only": True}, False)

    def test_freeze(self):
        model = freeze(tiny_model().train())
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


class TestRemoteCode:
    """A checkpoint whose configuration names code of its own, which leaves a mark when it runs."""

    def test_remote_code_only_when_asked(self, base, tmp_path, make_args, tokenizer):
        (base / "own.py").write_text(
            f"from transformers import LlamaConfig, LlamaForCausalLM\nopen({str(tmp_path / 'mark')!r}, 'w').close()\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
            "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
        config = json.loads((base / "config.json").read_text())
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        (base / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
        rows = {"train_dataset": prompt_dataset(), "processing_class": tokenizer}
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_teacher(str(base))
        for names in ({"model": str(base)}, {"model": tiny_model(), "teacher_model": str(base)}):
            with pytest.raises(ValueError, match="trust_remote_code"):
                PromptKDTrainer(**names, args=make_args(), **rows)
        assert load_teacher_tokenizer(str(base)) is None
        assert not (tmp_path / "mark").exists()
        assert type(load_teacher(str(base), trust_remote_code=True)).__name__ == "OwnModel"
        assert (tmp_path / "mark").exists()


class TestDisableDropout:
    @pytest.mark.parametrize(
        ("family", "rates"),
        [
            ("falcon", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),  # read from the configuration at each call
            ("opt", {"dropout": 0.5, "attention_dropout": 0.5}),  # numbers in the layers
            ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),  # modules
            ("llama", {"attention_dropout": 0.5}),
        ],
    )
    def test_training_mode_computes_as_evaluation_mode(self, family, rates):
        model = tiny_model(family, **rates)
        ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
        expected = model(ids).logits
        assert not torch.equal(model.train()(ids).logits, expected)  # else the test could not fail
        disable_dropout(model)
        torch.testing.assert_close(model(ids).logits, expected)
        assert {name: getattr(model.config, name) for name in rates} == rates  # what is saved with the model

    def test_a_teachers_gradient_checkpointing_is_without_it(self):
        model = freeze(tiny_model("falcon", hidden_dropout=0.5, attention_dropout=0.5))
        ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
        expected = model(ids).logits
        disable_dropout(model)
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        with recomputed_activations(model, True):
            torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)
