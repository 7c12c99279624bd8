import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from tiny import difference, tiny_model, tiny_tokenizer, weights
from transformers import AutoModelForCausalLM

from trl_promptkd.models.init_kwargs import check_init_kwargs
from trl_promptkd.models.student import adapter_config, check_trains


KINDS = {
    "lora": LoraConfig(task_type="CAUSAL_LM"),
    "dora": LoraConfig(task_type="CAUSAL_LM", use_dora=True),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "oft": OFTConfig(task_type="CAUSAL_LM", r=0, oft_block_size=4, target_modules=["q_proj"]),
    "vera": VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "loha": LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "lokr": LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "adalora": AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1),
    "saved": LoraConfig(task_type="CAUSAL_LM", modules_to_save=["norm"]),
}


def adapted(kind="lora", seed=1):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(seed=seed), KINDS[kind])


@pytest.fixture
def folders(tmp_path):
    """A base model with its tokenizer, and a LoRA adapter of it whose weights are not 0."""
    tiny_model(seed=1).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    return tmp_path


class TestSomethingTrains:
    @pytest.mark.parametrize("kind", KINDS)
    def test_an_adapter_does_until_it_is_frozen_merged_or_off(self, kind, tmp_path):
        model = adapted(kind)
        check_trains(model)
        model.save_pretrained(tmp_path)
        check_trains(PeftModel.from_pretrained(tiny_model(seed=1), tmp_path, is_trainable=True))
        with pytest.raises(ValueError, match=r"'default' is frozen .*is_trainable=True"):
            check_trains(PeftModel.from_pretrained(tiny_model(seed=1), tmp_path))
        with model.disable_adapter(), pytest.raises(ValueError, match="switched off"):
            check_trains(model.requires_grad_(False))
        with pytest.raises(ValueError, match="has no trainable weights"):
            check_trains(adapted(kind).requires_grad_(False))
        if kind not in ("saved", "oft"):
            merged = adapted(kind)
            merged.merge_adapter()
            with pytest.raises(ValueError, match="merged"):
                check_trains(merged)
            merged.unmerge_adapter()
            check_trains(merged)

    def test_what_is_left_of_a_merged_adapter(self):
        """`merge_and_unload` gives the model back, whose weights the adapter had frozen."""
        message = r"a LlamaForCausalLM without trainable weights.*`model.requires_grad_\(True\)`"
        with pytest.raises(ValueError, match=message):
            check_trains(adapted().merge_and_unload())

    def test_an_active_adapter_that_is_frozen_beside_an_inactive_one(self):
        model = adapted()
        model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2))
        check_trains(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".other." in name)
        with pytest.raises(ValueError, match="its active adapter 'default' is frozen"):
            check_trains(model)
        model.set_adapter("other")
        check_trains(model)

    def test_a_part_of_the_weights_will_do(self):
        model = tiny_model().requires_grad_(False)
        model.lm_head.requires_grad_(True)
        check_trains(model)
        with_bias = adapted().requires_grad_(False)
        next(with_bias.parameters()).requires_grad_(True)
        check_trains(with_bias)

    @pytest.mark.parametrize("student", ["full", "from_pretrained", "merged"])
    def test_is_refused_before_anything_is_tokenized(self, make_trainer, student, folders, monkeypatch):
        model = tiny_model(seed=1).requires_grad_(False)
        if student == "from_pretrained":
            model = PeftModel.from_pretrained(model, folders / "lora")
        if student == "merged":
            model = adapted().merge_and_unload()
        monkeypatch.setattr("trl_promptkd.trainer.datasets.tokenize_dataset", pytest.fail)
        monkeypatch.setattr("trl_promptkd.trainer.primed_distill_trainer.tokenize_primed_dataset", pytest.fail)
        with pytest.raises(ValueError, match=r"without trainable weights|has no trainable weights.*is_trainable=True"):
            make_trainer(model)

    def test_a_peft_config_trains_a_frozen_model(self, make_trainer):
        trainer = make_trainer(tiny_model(seed=1).requires_grad_(False), peft_config=LoraConfig(task_type="CAUSAL_LM"))
        before = weights(trainer.model)
        trainer.train()
        assert difference(weights(trainer.model), before) > 0

    def test_a_peft_config_that_trains_nothing(self, make_trainer):
        with pytest.raises(ValueError, match=r"set `inference_mode=False`"):
            make_trainer(tiny_model(), peft_config=LoraConfig(task_type="CAUSAL_LM", inference_mode=True))
        with pytest.raises(ValueError, match=r"nowhere.* not found in the base model"):
            make_trainer(tiny_model(), peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["nowhere"]))


class TestAdapterByName:
    @pytest.mark.parametrize("with_tokenizer", [True, False])
    @pytest.mark.parametrize("teacher", [True, False])
    def test_is_trained_further(self, make_trainer, folders, teacher, with_tokenizer):
        if with_tokenizer:
            tiny_tokenizer().save_pretrained(folders / "lora")
        settings = {"processing_class": None, "max_steps": 2, "learning_rate": 0.05}
        trainer = make_trainer(str(folders / "lora"), tiny_model(seed=2) if teacher else None, **settings)
        start = weights(PeftModel.from_pretrained(tiny_model(seed=1), folders / "lora"))
        assert isinstance(trainer.model, PeftModel)
        assert difference(weights(trainer.model), start) == 0
        assert (trainer.teacher_model is None) == (not teacher)
        trainer.train()
        moved = {n for n, v in weights(trainer.model).items() if not torch.equal(v, start[n])}
        assert moved == {n for n in start if "lora_" in n}
        trainer.save_model()
        saved = json.loads((folders / "run" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(folders / "base")
        again = PeftModel.from_pretrained(tiny_model(seed=1), folders / "run")
        assert difference(weights(again), weights(trainer.model)) == 0

    def test_equals_the_same_adapter_as_an_object(self, make_trainer, folders):
        results = []
        for by_name in (True, False):
            model = str(folders / "lora")
            if not by_name:
                model = PeftModel.from_pretrained(tiny_model(seed=1), model, is_trainable=True)
            trainer = make_trainer(model, tiny_model(seed=2), max_steps=2, learning_rate=0.05)
            trainer.train()
            results.append(weights(trainer.model))
        assert difference(*results) == 0

    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    def test_model_init_kwargs_are_for_the_model_below(self, make_trainer, folders, key, caplog, propagate):
        settings = {"model_init_kwargs": {key: "bfloat16", "attn_implementation": "eager"}}
        trainer = make_trainer(str(folders / "lora"), **settings)
        base = trainer.model.get_base_model()
        assert base.model.embed_tokens.weight.dtype == torch.bfloat16
        assert base.config._attn_implementation == "eager"
        assert trainer.args.model_init_kwargs == settings["model_init_kwargs"]
        assert "will be ignored" not in caplog.text

    def test_without_a_base_model_is_refused(self, make_trainer, folders):
        path = folders / "lora" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
        with pytest.raises(ValueError, match="does not name the model below it"):
            make_trainer(str(folders / "lora"))

    def test_what_is_no_adapter(self, folders):
        for name in (str(folders / "base"), str(folders / "nowhere"), "", None, tiny_model()):
            assert adapter_config(name) is None


class TestInitKwargs:
    @pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16, "auto"])
    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    def test_a_dtype_by_either_name_for_student_and_teacher(self, make_trainer, folders, key, given):
        tiny_model(seed=1, dtype=torch.bfloat16).save_pretrained(folders / "base")
        settings = {name: {key: given} for name in ("model_init_kwargs", "teacher_model_init_kwargs")}
        trainer = make_trainer(str(folders / "base"), str(folders / "base"), **settings)
        assert trainer.model.dtype == torch.bfloat16
        assert trainer.teacher_model.dtype == torch.bfloat16
        assert trainer.args.model_init_kwargs == settings["model_init_kwargs"]

    def test_any_dtype_of_torchs_by_its_name(self, make_trainer, folders):
        trainer = make_trainer(str(folders / "base"), tiny_model(seed=2), model_init_kwargs={"dtype": "double"})
        assert trainer.model.dtype == torch.float64

    @pytest.mark.parametrize("field", ["model_init_kwargs", "teacher_model_init_kwargs"])
    def test_two_dtypes_are_refused(self, make_trainer, field):
        kwargs = {"dtype": "float32", "torch_dtype": torch.bfloat16}
        with pytest.raises(ValueError, match=rf"`{field}` holds 'dtype' 'float32' and 'torch_dtype' torch.bfloat16"):
            make_trainer("no/student", "no/teacher", **{field: kwargs})

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"dtype": "half precision"}, r"`x\['dtype'\]` is 'half precision'"),
            ({"torch_dtype": "half precision"}, r"`x\['torch_dtype'\]` is 'half precision'"),
            ({"load_in_4bit": True}, r"'load_in_4bit'.*quantization_config': {'load_in_4bit': True}"),
            ({"load_in_8bit": True}, r"'load_in_8bit'.*quantization_config': {'load_in_8bit': True}"),
        ],
    )
    def test_what_would_be_taken_wrongly_is_refused(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            check_init_kwargs("x", kwargs)

    def test_a_misspelt_argument_is_an_error(self, make_trainer, folders):
        with pytest.raises(TypeError, match="attn_implemention"):
            make_trainer(str(folders / "base"), model_init_kwargs={"attn_implemention": "eager"})
