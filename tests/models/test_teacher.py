import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import WORDS, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trl_promptkd import PromptKDTrainer
from trl_promptkd.models.forward import input_embeddings
from trl_promptkd.models.init_kwargs import check_init_kwargs
from trl_promptkd.models.limits import position_limit
from trl_promptkd.models.teacher import disable_dropout, freeze, load_teacher, recomputed_activations
from trl_promptkd.models.tokenizer import check_same_tokenizer, load_teacher_tokenizer, shared_vocab_size
from trl_promptkd.trainer.checks import check_found


class TestTokenizers:
    def test_equal_ones_pass(self):
        check_same_tokenizer(tiny_tokenizer(), tiny_tokenizer())

    def test_the_first_differing_token_is_named(self):
        other = [*WORDS]
        other[3], other[5] = "an", "pupil"
        with pytest.raises(ValueError, match=r"id 9, which is 'a' for the student .* and 'an' for the teacher"):
            check_same_tokenizer(tiny_tokenizer(), tiny_tokenizer(other))

    def test_a_missing_token_is_named(self):
        with pytest.raises(ValueError, match=f"'{WORDS[-1]}' for the student .* and None for the teacher"):
            check_same_tokenizer(tiny_tokenizer(WORDS), tiny_tokenizer(WORDS[:-1]))

    def test_a_folder_without_tokenizer_gives_none(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        assert load_teacher_tokenizer(str(tmp_path)) is None
        assert load_teacher_tokenizer("") is None
        tiny_tokenizer().save_pretrained(tmp_path)
        assert load_teacher_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer().get_vocab()

    def test_an_adapters_folder_gives_that_of_the_model_below_it(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
        assert load_teacher_tokenizer(str(tmp_path / "lora")).get_vocab() == tiny_tokenizer().get_vocab()


class TestSharedVocabSize:
    def test_one_size_compares_everything(self):
        assert shared_vocab_size(tiny_model(), tiny_model(seed=1), tiny_tokenizer()) == 40

    def test_padding_of_one_size_compares_the_real_ids(self):
        models = tiny_model(vocab_size=48), tiny_model(vocab_size=48, seed=1)
        assert shared_vocab_size(*models, tiny_tokenizer(WORDS)) == 30

    def test_other_padding_compares_the_real_ids(self):
        tokenizer = tiny_tokenizer()
        teacher = tiny_model(vocab_size=64)
        assert shared_vocab_size(tiny_model(), teacher, tokenizer) == len(tokenizer)

    def test_special_tokens_beyond_both_vocabularies_are_no_obstacle(self):
        tokenizer = tiny_tokenizer()  # as Gemma 3's text models, whose tokenizer knows an image token
        size = len(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        assert len(tokenizer) == size + 1
        assert shared_vocab_size(tiny_model(vocab_size=size), tiny_model(vocab_size=size), tokenizer) == size
        assert shared_vocab_size(tiny_model(vocab_size=size), tiny_model(vocab_size=64), tokenizer) == size

    def test_too_small_a_vocabulary_is_refused(self):
        with pytest.raises(ValueError, match=r"teacher's vocabulary has 20 entries.* with id 20"):
            shared_vocab_size(tiny_model(), tiny_model(vocab_size=20), tiny_tokenizer())


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
    def test_init_kwargs_with_and_without_dtype(self, tmp_path, init_kwargs, dtype):
        tiny_model().save_pretrained(tmp_path)
        given = copy.deepcopy(init_kwargs)
        assert load_teacher(str(tmp_path), init_kwargs).dtype == dtype
        assert init_kwargs == given

    def test_a_quantization_config_may_be_a_dict(self, tmp_path):
        pytest.importorskip("bitsandbytes")
        tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
        teacher = load_teacher(str(tmp_path), {"quantization_config": {"load_in_4bit": True}})
        assert teacher.is_loaded_in_4bit

    def test_an_unknown_dtype_is_named(self):
        with pytest.raises(ValueError, match="'bf16'"):
            load_teacher("anything", {"dtype": "bf16"})

    def test_freeze(self):
        model = tiny_model().train()
        freeze(model)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_no_input_embeddings(self, monkeypatch):
        model = tiny_model()
        monkeypatch.setattr(model, "get_input_embeddings", lambda: None)
        with pytest.raises(ValueError, match="no input embeddings"):
            input_embeddings(model)

    @pytest.mark.parametrize(("family", "limit"), [("gpt2", 128), ("opt", 128), ("llama", None), ("gpt_neox", None)])
    def test_position_limit(self, family, limit):
        assert position_limit(tiny_model(family)) == limit


class TestRemoteCode:
    """A checkpoint whose configuration names code of its own, which leaves a mark when it runs."""

    @pytest.fixture
    def folder(self, tmp_path):
        path = tmp_path / "model"
        path.mkdir()
        mark = f"open({str(tmp_path / 'mark')!r}, 'w').close()"
        own = "from transformers import LlamaConfig, LlamaForCausalLM\n"
        (path / "own.py").write_text(
            f"{own}{mark}\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\nclass OwnModel(LlamaForCausalLM):\n"
            "    config_class = OwnConfig\n"
        )
        model = tiny_model()
        model.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        config |= {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        }
        (path / "config.json").write_text(json.dumps(config))
        return path

    def test_remote_code_only_when_asked(self, folder, tmp_path, make_args, tokenizer):
        rows = {"train_dataset": prompt_dataset(), "processing_class": tokenizer}
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_teacher(str(folder))
        for names in ({"model": str(folder)}, {"model": tiny_model(), "teacher_model": str(folder)}):
            with pytest.raises(ValueError, match="trust_remote_code"):
                PromptKDTrainer(**names, args=make_args(), **rows)
        assert load_teacher_tokenizer(str(folder)) is None
        assert not (tmp_path / "mark").exists()
        assert type(load_teacher(str(folder), trust_remote_code=True)).__name__ == "OwnModel"
        assert (tmp_path / "mark").exists()


class TestTeachersByName:
    def test_an_adapters_folder_is_found(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "base")
        base = load_teacher(str(tmp_path / "base"))
        adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        adapter.save_pretrained(tmp_path / "adapter")
        check_found("teacher_model", str(tmp_path / "adapter"), None, False)
        assert isinstance(load_teacher(str(tmp_path / "adapter")), PreTrainedModel)
        with pytest.raises(OSError, match="`teacher_model` is 'no/such-model', which cannot be loaded"):
            check_found("teacher_model", "no/such-model", {"local_files_only": True}, False)

    def test_what_bitsandbytes_writes_of_itself_is_taken(self):
        settings = BitsAndBytesConfig(load_in_4bit=True).to_dict()
        check_init_kwargs("teacher_model_init_kwargs", {"quantization_config": settings})


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
