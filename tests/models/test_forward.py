import copy

import pytest
import torch
from padding import ROWS, pad
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import CONFIGS, HEADS, VOCAB_SIZE, dequantized, tiny_model

from trl_promptkd.models.forward import (
    TokenStates,
    completion_states,
    forward_logits,
    inside_forward,
    prompted_embeddings,
)
from trl_promptkd.models.teacher import freeze, load_teacher


FAMILIES = sorted(CONFIGS)


def alone(model, row, soft_prompt=None):
    """Log-probabilities of a row by itself, by nothing but the model's own forward."""
    ids = torch.tensor([row])
    if soft_prompt is None:
        return model(input_ids=ids).logits[0].log_softmax(-1)
    embeds = torch.cat([soft_prompt[None], model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=embeds).logits[0, len(soft_prompt) :].log_softmax(-1)


class TestForwardLogits:
    @pytest.fixture(autouse=True)
    def _no_grad(self):
        with torch.no_grad():
            yield

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


class TestCompletionStates:
    @pytest.fixture(autouse=True)
    def _no_grad(self):
        with torch.no_grad():
            yield

    def test_selects_what_predicts_the_labels_in_their_order(self):
        model = tiny_model("gpt2")
        ids, mask, _ = pad(ROWS, "left")
        labels = torch.full_like(ids, -100)
        labels[0, -3:], labels[1, -1:], labels[2, -2:] = ids[0, -3:], ids[1, -1:], ids[2, -2:]
        expected = torch.cat(
            [alone(model, ROWS[0])[-4:-1], alone(model, ROWS[1])[-2:-1], alone(model, ROWS[2])[-3:-1]]
        )
        known = completion_states(model, ids, mask, labels)
        assert known.hidden_states.shape == (6, 32)
        got = known.logits()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.log_softmax(-1), expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("prompted", [True, False])
    @pytest.mark.parametrize("side", ["left", "right", "both"])
    @pytest.mark.parametrize("family", [*FAMILIES, *HEADS])
    def test_logits_are_those_of_the_models_own_forward(self, family, side, prompted):
        """Bias, scaling and soft-capping of the output included."""
        model = tiny_model(family)
        soft_prompt = torch.randn(5, 32) * 0.3 if prompted else None
        ids, mask, _ = pad(ROWS, side)
        labels = torch.where(mask == 1, ids, -100)
        labels[:, 1:][mask[:, :-1] == 0] = -100  # what padding predicts means nothing
        trained = labels[:, 1:] != -100
        expected = forward_logits(model, ids, mask, soft_prompt)[:, :-1][trained]
        known = completion_states(model, ids, mask, labels, soft_prompt)
        torch.testing.assert_close(known.logits(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(known.logits(2, 5), expected[2:5], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("side", ["left", "right", "both"])
    @pytest.mark.parametrize("family", sorted({*FAMILIES, *HEADS} - {"opt"}))
    def test_rows_end_to_end_give_what_padded_rows_give(self, family, side):
        """OPT's mask does not come from positions."""
        model = tiny_model(family)
        ids, mask, _ = pad(ROWS, side)
        labels = torch.where(mask == 1, ids, -100)
        labels[:, 1:][mask[:, :-1] == 0] = -100
        expected = completion_states(model, ids, mask, labels)
        known = completion_states(model, ids, mask, labels, padding_free=True)
        assert known.hidden_states.shape == expected.hidden_states.shape
        torch.testing.assert_close(known.logits(), expected.logits(), atol=1e-5, rtol=1e-5)

    def test_rows_end_to_end_are_tokens_alone_with_positions_of_their_own(self):
        model = tiny_model("llama")
        given = []
        model.get_decoder().register_forward_pre_hook(lambda _, __, inputs: given.append(inputs), with_kwargs=True)
        ids, mask, _ = pad(ROWS, "both")
        labels = torch.full_like(ids, -100)
        labels[:, 3] = ids[:, 3]
        completion_states(model, ids, mask, labels, padding_free=True)
        assert given[0]["input_ids"].tolist() == [[token for row in ROWS for token in row]]
        assert given[0]["position_ids"].tolist() == [[index for row in ROWS for index in range(len(row))]]
        assert given[0].get("attention_mask") is None

    @pytest.mark.parametrize("padding_free", [True, False])
    def test_every_label_has_a_state(self, padding_free):
        """One on padding too, though it means nothing."""
        model = tiny_model("llama")
        ids, mask, _ = pad(ROWS, "left")
        labels = torch.full_like(ids, -100)
        labels[1, 6] = 3  # the row starts here
        labels[0, -1], labels[2, -2] = 4, 5
        known = completion_states(model, ids, mask, labels, padding_free=padding_free)
        expected = torch.cat([alone(model, ROWS[0])[-2:-1], alone(model, ROWS[2])[-3:-2]])
        torch.testing.assert_close(known.logits()[::2].log_softmax(-1), expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("padding_free", [True, False])
    def test_a_single_token_has_nothing_to_predict_it(self, padding_free):
        one = torch.ones(2, 1, dtype=torch.long)
        assert len(completion_states(tiny_model("llama"), one, one, one, padding_free=padding_free)) == 0

    def test_a_scaled_head_is_told_from_a_bare_one(self):
        """Else the test above could pass on models whose scale happens to be 1."""
        for family in HEADS:
            model = tiny_model(family)
            known = completion_states(model, *pad(ROWS, "left")[:2], torch.ones(3, 9, dtype=torch.long))
            bare = model.get_output_embeddings()(known.hidden_states)
            assert (known.logits() - bare).abs().max() > 0.01, family

    def test_lora_on_the_head_counts(self):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        lora = get_peft_model(tiny_model("llama"), config).eval()
        ids, mask, _ = pad(ROWS, "left")
        labels = torch.where(mask == 1, ids, -100)
        labels[:, 1:][mask[:, :-1] == 0] = -100
        known = completion_states(lora, ids, mask, labels)
        expected = lora(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(
            known.logits(), expected[:, :-1][mask[:, 1:] * mask[:, :-1] == 1], atol=1e-4, rtol=0
        )
        assert len(known.head_parameters()) == 2  # A and B; the weight below is frozen

    def test_keeps_the_shared_vocabulary(self):
        model = tiny_model("llama")
        ids, mask, _ = pad(ROWS, "right")
        known = completion_states(model, ids, mask, torch.where(mask == 1, ids, -100), vocab_size=36)
        assert known.logits().shape == (sum(map(len, ROWS)) - len(ROWS), 36)

    def test_nothing_trained_gives_no_rows(self):
        model = tiny_model("llama")
        ids, mask, _ = pad(ROWS, "right")
        known = completion_states(model, ids, mask, torch.full_like(ids, -100))
        assert len(known) == 0
        assert known.logits().shape == (0, VOCAB_SIZE)

    def test_a_forward_that_goes_round_the_decoder_is_refused(self, monkeypatch):
        model = tiny_model("llama")
        monkeypatch.setattr(model, "get_decoder", lambda: torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"LlamaForCausalLM does not go through `get_decoder\(\)`"):
            TokenStates(torch.randn(3, 32), model).logits()

    def test_the_model_is_left_as_it_was(self):
        model = tiny_model("llama")
        before = set(model.__dict__), set(model.model.__dict__)
        completion_states(model, *pad(ROWS, "left")[:2], torch.ones(3, 9, dtype=torch.long)).logits()
        assert inside_forward(model, lambda bare: bare(input_ids=torch.tensor([[1]])).logits.shape) == (
            1,
            1,
            VOCAB_SIZE,
        )
        assert (set(model.__dict__), set(model.model.__dict__)) == before


class TestInsideForward:
    def test_a_wrappers_forward_is_on_the_way(self):
        seen = []

        class Wrapper(torch.nn.parallel.DistributedDataParallel):
            def __init__(self, module):
                torch.nn.Module.__init__(self)
                self.module = module

            def forward(self):
                seen.append("wrapper")
                return self.module()

        model = tiny_model("llama")
        assert inside_forward(Wrapper(model), lambda bare: bare is model)
        assert seen == ["wrapper"]

    def test_a_failure_leaves_the_models_own_forward(self):
        model = tiny_model("llama")
        with pytest.raises(RuntimeError, match="no"):
            inside_forward(model, lambda bare: (_ for _ in ()).throw(RuntimeError("no")))
        assert "forward" not in model.__dict__


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


def test_a_soft_prompts_gradient_is_the_same_each_time():
    """To the bit, on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    model = tiny_model(hidden_size=256)
    soft_prompt = torch.randn(7, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.full((8, 100), 5)
    try:
        gradients = []
        for _ in range(20):
            embeds, _mask = prompted_embeddings(model, ids, torch.ones_like(ids), soft_prompt)
            weights = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1))
            gradients += torch.autograd.grad((embeds * weights).sum(), soft_prompt)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
