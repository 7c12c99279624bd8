import copy

import peft
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig
from tiny import VOCAB_SIZE, WORDS, tiny_model, tiny_tokenizer

from trl_promptkd import PromptEncoderConfig, SoftPrompt
from trl_promptkd.models.forward import forward_logits
from trl_promptkd.models.soft_prompt import check_peft_config


TEXT = "suppose you are a student ."
TEXT_IDS = [6, 7, 8, 9, 10, 11]
ENCODERS = ["embedding", "mlp", "lstm"]


def build(teacher=None, **settings):
    teacher = tiny_model(seed=3) if teacher is None else teacher
    return SoftPrompt(
        PromptEncoderConfig(**{"prompt_init_text": TEXT, **settings}), teacher, tiny_tokenizer()
    ), teacher


class TestConfig:
    def test_defaults_are_the_papers(self):
        config = PromptEncoderConfig()
        assert (config.num_virtual_tokens, config.prompt_init) == (7, "text")
        assert config.prompt_init_text == "Suppose you are a student."
        assert config.prompt_learning_rate is None
        assert (config.prompt_weight_decay, config.prompt_max_grad_norm) == (0.01, 1.0)

    def test_an_unknown_schedule_is_refused(self):
        with pytest.raises(ValueError, match="`prompt_lr_scheduler_type` is 'cosin'; it must be 'linear' or 'cosine'"):
            PromptEncoderConfig(prompt_lr_scheduler_type="cosin")

    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_to_peft(self, encoder):
        config = PromptEncoderConfig(encoder=encoder).to_peft(tiny_model(), tiny_tokenizer())
        assert (config.num_virtual_tokens, config.token_dim, config.num_layers) == (7, 32, 2)
        assert config.task_type == "CAUSAL_LM"
        if encoder == "embedding":
            assert type(config) is PromptTuningConfig
            assert config.prompt_tuning_init == "TEXT"
            assert config.prompt_tuning_init_text == "Suppose you are a student."
        else:
            assert type(config) is peft.PromptEncoderConfig
            assert config.encoder_reparameterization_type == encoder.upper()

    def test_to_peft_without_a_model(self):
        assert PromptEncoderConfig(prompt_init="vocab").to_peft().prompt_tuning_init == "SAMPLE_VOCAB"

    def test_what_is_not_a_prompt_before_the_input_is_refused(self):
        prefix = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        with pytest.raises(TypeError, match="is a PrefixTuningConfig, which does not describe a soft prompt"):
            check_peft_config(prefix)
        with pytest.raises(ValueError, match="`num_virtual_tokens` is 0"):
            check_peft_config(PromptTuningConfig(num_virtual_tokens=0))


class TestInitialization:
    @pytest.mark.parametrize("encoder", ENCODERS)
    @pytest.mark.parametrize(("tokens", "ids"), [(4, TEXT_IDS[:4]), (8, [*TEXT_IDS, 6, 7])])
    def test_text_is_cut_or_repeated(self, encoder, tokens, ids):
        prompt, teacher = build(num_virtual_tokens=tokens, encoder=encoder)
        expected = teacher.get_input_embeddings()(torch.tensor(ids))
        torch.testing.assert_close(prompt(), expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
    @pytest.mark.parametrize("init", ["vocab", "text"])
    def test_tokens_have_the_embeddings_that_the_model_takes(self, family, init):
        prompt, teacher = build(tiny_model(family, seed=3), prompt_init=init)
        seen = []
        layer = teacher.model.layers[0]
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True)
        teacher(torch.arange(VOCAB_SIZE)[None])
        assert (torch.cdist(prompt(), seen[0][0]).min(dim=1).values < 0.05).all()

    @pytest.mark.parametrize(("family", "scale"), [("gemma2", 32**0.5), ("gemma3", 32**0.5), ("llama", 1.0)])
    @pytest.mark.parametrize("own_config", [True, False])
    def test_random_has_the_scale_of_what_the_embedding_module_puts_out(self, family, scale, own_config):
        """Gemma multiplies them by the root of their width. What follows the tokenizer's 30 ids means nothing."""
        teacher = tiny_model(family, seed=3)
        weight = teacher.get_input_embeddings().weight
        with torch.no_grad():
            weight[30:] = 100.0
        config = PromptEncoderConfig(prompt_init="random", num_virtual_tokens=512)
        if not own_config:
            config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=512, prompt_tuning_init="RANDOM")
        prompt = SoftPrompt(config, teacher, tiny_tokenizer(WORDS))
        assert prompt().std().item() == pytest.approx(scale * weight[:30].std().item(), rel=0.03)

    @pytest.mark.parametrize("init", ["vocab", "random"])
    def test_one_seed_gives_one_start(self, init):
        """On all ranks, and in a run that is started again. A new tokenizer may name its tokens in another order."""
        starts = []
        for _ in range(2):
            torch.manual_seed(0)
            starts.append(build(prompt_init=init)[0]())
        assert torch.equal(*starts)

    def test_a_network_starts_at_random_embeddings_too(self):
        torch.manual_seed(0)
        prompt, teacher = build(prompt_init="random", num_virtual_tokens=24, encoder="mlp")
        assert prompt().std().item() == pytest.approx(teacher.get_input_embeddings().weight.std().item(), rel=0.1)

    @pytest.mark.parametrize("init", ["vocab", "random"])
    def test_a_tokenizer_with_more_tokens_than_embeddings(self, init):
        """Gemma 3's text models: their tokenizer knows an image token."""
        tokenizer = tiny_tokenizer(WORDS)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        config = PromptEncoderConfig(prompt_init=init, num_virtual_tokens=200)
        assert SoftPrompt(config, tiny_model(vocab_size=30), tokenizer)().isfinite().all()

    def test_quantized_embeddings(self):
        bnb = pytest.importorskip("bitsandbytes")
        teacher = tiny_model(hidden_size=64, intermediate_size=64)
        table = bnb.nn.Embedding4bit(40, 64)
        table.load_state_dict(teacher.get_input_embeddings().state_dict())
        teacher.set_input_embeddings(table.to("cpu"))
        torch.manual_seed(0)
        prompt, _ = build(teacher, prompt_init="random", num_virtual_tokens=256)
        assert prompt().shape == (256, 64)
        assert prompt().std().item() == pytest.approx(table(torch.arange(30)).std().item(), rel=0.03)

    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_float32_beside_a_half_precision_teacher(self, encoder):
        prompt, _ = build(tiny_model(dtype=torch.bfloat16), encoder=encoder)
        assert prompt().dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in prompt.parameters())

    def test_the_teacher_is_not_changed(self):
        teacher = tiny_model()
        before = copy.deepcopy(teacher.state_dict())
        build(teacher)
        assert type(teacher).__name__ == "LlamaForCausalLM"
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())

    def test_peft_configs_are_taken_as_they_are(self):
        teacher, tokenizer = tiny_model(), tiny_tokenizer()
        text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": "not/needed"}
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **text)
        prompt = SoftPrompt(config, teacher, tokenizer)
        torch.testing.assert_close(prompt(), teacher.get_input_embeddings()(torch.tensor(TEXT_IDS[:4])))
        assert config.token_dim is None  # the caller's object is left alone
        mlp = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16)
        assert SoftPrompt(mlp, teacher, tokenizer)().shape == (3, 32)


class TestAdapter:
    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_loads_through_peft_with_equal_logits(self, tmp_path, encoder):
        prompt, teacher = build(encoder=encoder)
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        prompt.save_adapter(str(tmp_path))
        ids = torch.tensor([[7, 8, 9, 10], [12, 13, 14, 15]])
        ours = forward_logits(teacher, ids, torch.ones_like(ids), prompt())
        loaded = PeftModel.from_pretrained(teacher, tmp_path).eval()
        assert loaded.peft_config["default"].num_virtual_tokens == 7
        theirs = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 7:]
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("encoder", ["embedding", "mlp"])
    def test_of_a_teacher_without_attention(self, tmp_path, encoder):
        """PEFT wants the number of heads, which a state space model does not have."""
        prompt, teacher = build(tiny_model("mamba", num_hidden_layers=3), encoder=encoder)
        about = prompt.peft_config
        assert (about.token_dim, about.num_layers, about.num_attention_heads) == (32, 3, 1)
        prompt.save_adapter(str(tmp_path))
        loaded = PeftModel.from_pretrained(copy.deepcopy(teacher), tmp_path).eval()
        torch.testing.assert_close(loaded.get_prompt(1)[0], prompt())
        own = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        assert SoftPrompt(own, teacher, tiny_tokenizer())().shape == (3, 32)

    def test_of_a_teacher_whose_embeddings_are_narrower_than_its_layers(self):
        prompt, _ = build(tiny_model("opt", word_embed_proj_dim=16))
        assert prompt().shape == (7, 16)
        assert prompt.peft_config.token_dim == 16

    def test_drift_is_relative_to_the_initial_prompt(self):
        prompt, _ = build()
        assert prompt.drift() == 0
        with torch.no_grad():
            prompt.encoder.embedding.weight.mul_(1.5)
        assert prompt.drift() == pytest.approx(0.5, rel=1e-5)
