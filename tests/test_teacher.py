import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import CONFIGS, VOCAB_SIZE, WORDS, dequantized, tiny_model, tiny_tokenizer

from trl_promptkd.teacher import (
    check_same_tokenizer,
    completion_logits,
    forward_logits,
    freeze,
    input_embeddings,
    load_teacher,
    load_teacher_tokenizer,
    position_limit,
    shared_vocab_size,
)


ROWS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18], [19, 20, 21, 22, 23, 24]]
FAMILIES = sorted(CONFIGS)


def pad(rows, side):
    """ids and mask with the padding on one side, or two tokens of it on both."""
    width = max(map(len, rows)) + (4 if side == "both" else 0)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    starts = []
    for i, row in enumerate(rows):
        start = {"right": 0, "left": width - len(row), "both": 2}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        starts.append(start)
    return ids, mask, starts


def alone(model, row, soft_prompt=None):
    """Log-probabilities of a row by itself, by nothing but the model's own forward."""
    ids = torch.tensor([row])
    if soft_prompt is None:
        return model(input_ids=ids).logits[0].log_softmax(-1)
    embeds = torch.cat([soft_prompt[None], model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=embeds).logits[0, len(soft_prompt) :].log_softmax(-1)


@torch.no_grad()
class TestForwardLogits:
    @pytest.mark.parametrize("side", ["left", "right", "both"])
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("prompted", [True, False])
    def test_padded_rows_equal_rows_alone(self, family, side, prompted):
        model = tiny_model(family)
        soft_prompt = torch.randn(5, 32) * 0.3 if prompted else None
        ids, mask, starts = pad(ROWS, side)
        logits = forward_logits(model, ids, mask, soft_prompt)
        assert logits.shape == (*ids.shape, VOCAB_SIZE)
        for i, (row, start) in enumerate(zip(ROWS, starts, strict=True)):
            got = logits[i, start : start + len(row)].log_softmax(-1)
            torch.testing.assert_close(got, alone(model, row, soft_prompt), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_prompt_of_token_embeddings_equals_the_tokens_themselves(self, family):
        model = tiny_model(family)
        tokens = [30, 31, 32]
        soft_prompt = model.get_input_embeddings()(torch.tensor(tokens))
        ids, mask, starts = pad(ROWS, "left")
        logits = forward_logits(model, ids, mask, soft_prompt)
        for i, (row, start) in enumerate(zip(ROWS, starts, strict=True)):
            got = logits[i, start : start + len(row)].log_softmax(-1)
            torch.testing.assert_close(got, alone(model, tokens + row)[len(tokens) :], atol=1e-4, rtol=0)

    def test_peft_itself_is_off_under_left_padding(self):
        """Why this package has a forward pass of its own; if PEFT mends it, ours may go."""
        model = tiny_model("llama")
        peft_model = get_peft_model(
            copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        ).eval()
        soft_prompt = peft_model.prompt_encoder["default"].embedding.weight * 0.3
        peft_model.prompt_encoder["default"].embedding.weight.copy_(soft_prompt)
        ids, mask, starts = pad(ROWS, "left")
        row, start = ROWS[1], starts[1]
        expected = alone(model, row, soft_prompt)
        theirs = peft_model(input_ids=ids, attention_mask=mask).logits[1, 5 + start :].log_softmax(-1)
        ours = forward_logits(model, ids, mask, soft_prompt)[1, start:].log_softmax(-1)
        assert (theirs - expected).abs().max() > 0.05
        assert (ours - expected).abs().max() < 1e-4

    def test_only_the_last_columns_on_request(self):
        model = tiny_model("llama")
        ids, mask, _ = pad(ROWS, "left")
        soft_prompt = torch.randn(5, 32)
        last = forward_logits(model, ids, mask, soft_prompt, num_columns=3)
        torch.testing.assert_close(last, forward_logits(model, ids, mask, soft_prompt)[:, -3:])

    def test_half_precision_teacher_takes_a_float32_prompt(self):
        model = tiny_model("llama", dtype=torch.bfloat16)
        soft_prompt = torch.randn(5, 32, requires_grad=True)
        ids, mask, _ = pad(ROWS, "left")
        with torch.enable_grad():
            forward_logits(model, ids, mask, soft_prompt).float().sum().backward()
        assert soft_prompt.grad.dtype == torch.float32
        assert soft_prompt.grad.abs().sum() > 0

    def test_a_lora_teacher_is_asked_with_its_adapter(self):
        model = tiny_model("llama")
        lora = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
        ids, mask, starts = pad(ROWS, "left")
        soft_prompt = torch.randn(5, 32)
        got = forward_logits(lora, ids, mask, soft_prompt)[1, starts[1] :].log_softmax(-1)
        expected = alone(lora.get_base_model(), ROWS[1], soft_prompt)  # LoRA layers stand in the base model
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        assert (got - alone(model, ROWS[1], soft_prompt)).abs().max() > 0.05


class TestSoftPromptGradient:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_equals_the_sum_over_rows_alone(self, family, side):
        model = freeze(tiny_model(family))
        ids, mask, starts = pad(ROWS, side)
        soft_prompt = (torch.randn(5, 32) * 0.3).requires_grad_(True)
        logits = forward_logits(model, ids, mask, soft_prompt)
        total = sum(
            logits[i, s : s + len(r)].log_softmax(-1)[:, 5].sum()
            for i, (r, s) in enumerate(zip(ROWS, starts, strict=True))
        )
        (got,) = torch.autograd.grad(total, soft_prompt)
        (expected,) = torch.autograd.grad(sum(alone(model, r, soft_prompt)[:, 5].sum() for r in ROWS), soft_prompt)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
class TestCompletionLogits:
    def test_selects_what_predicts_the_labels_in_their_order(self):
        model = tiny_model("gpt2")
        ids, mask, _ = pad(ROWS, "left")
        labels = torch.full_like(ids, -100)
        labels[0, -3:], labels[1, -1:], labels[2, -2:] = ids[0, -3:], ids[1, -1:], ids[2, -2:]
        expected = torch.cat(
            [alone(model, ROWS[0])[-4:-1], alone(model, ROWS[1])[-2:-1], alone(model, ROWS[2])[-3:-1]]
        )
        got = completion_logits(model, ids, mask, labels)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.log_softmax(-1), expected, atol=1e-4, rtol=0)

    def test_keeps_the_shared_vocabulary(self):
        model = tiny_model("llama")
        ids, mask, _ = pad(ROWS, "right")
        got = completion_logits(model, ids, mask, torch.where(mask == 1, ids, -100), vocab_size=36)
        assert got.shape == (sum(map(len, ROWS)) - len(ROWS), 36)

    def test_nothing_trained_gives_no_rows(self):
        model = tiny_model("llama")
        ids, mask, _ = pad(ROWS, "right")
        assert completion_logits(model, ids, mask, torch.full_like(ids, -100)).shape == (0, VOCAB_SIZE)


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
            check_same_tokenizer(tiny_tokenizer(), tiny_tokenizer(WORDS[:-1]))

    def test_a_folder_without_tokenizer_gives_none(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        assert load_teacher_tokenizer(str(tmp_path)) is None
        assert load_teacher_tokenizer("") is None
        tiny_tokenizer().save_pretrained(tmp_path)
        assert load_teacher_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer().get_vocab()


class TestSharedVocabSize:
    def test_one_size_compares_everything(self):
        assert shared_vocab_size(tiny_model(), tiny_model(seed=1), tiny_tokenizer()) is None

    def test_other_padding_compares_the_real_ids(self):
        tokenizer = tiny_tokenizer()
        teacher = tiny_model(vocab_size=64)
        assert shared_vocab_size(tiny_model(), teacher, tokenizer) == len(tokenizer)

    def test_special_tokens_beyond_both_vocabularies_are_no_obstacle(self):
        tokenizer = tiny_tokenizer()  # as Gemma 3's text models, whose tokenizer knows an image token
        size = len(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        assert len(tokenizer) == size + 1
        assert shared_vocab_size(tiny_model(vocab_size=size), tiny_model(vocab_size=size), tokenizer) is None
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


class TestFourBit:
    """Trap: a forward pass without gradients repacks 4-bit weights for a kernel that has no backward."""

    @pytest.fixture
    def four_bit(self, tmp_path):
        pytest.importorskip("bitsandbytes")
        tiny_model(hidden_size=64, intermediate_size=64, num_key_value_heads=4).save_pretrained(tmp_path)
        return load_teacher(str(tmp_path), {"quantization_config": {"load_in_4bit": True}, "dtype": "float32"})

    @staticmethod
    def gradient(model):
        soft_prompt = torch.linspace(-1, 1, 5 * 64).reshape(5, 64).requires_grad_(True)
        ids, mask, _ = pad(ROWS, "left")
        with torch.no_grad():
            forward_logits(model, ids, mask)  # what repacks
        (gradient,) = torch.autograd.grad(forward_logits(model, ids, mask, soft_prompt).square().mean(), soft_prompt)
        return gradient

    def test_the_gradient_is_that_through_the_dequantized_copy(self, four_bit):
        expected = self.gradient(dequantized(four_bit))
        got = self.gradient(freeze(four_bit))
        assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.99
        assert 0.8 < got.norm() / expected.norm() < 1.25

    def test_weights_that_were_packed_before_are_unpacked(self, four_bit):
        if not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in four_bit.modules()):
            pytest.skip("this CPU has no AVX512-BF16: nothing is ever packed")
        expected = self.gradient(dequantized(four_bit))
        with torch.no_grad():
            four_bit.eval()(input_ids=torch.tensor([[7, 8, 9]]))
        got = self.gradient(freeze(four_bit))
        assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.99
