import pytest
import torch
from padding import ROWS, pad
from peft import LoraConfig, get_peft_model
from tiny import HEADS, VOCAB_SIZE, tiny_model

from trl_promptkd.divergences import entropy, generalized_jsd, kl_divergence
from trl_promptkd.losses import chunked as chunked_loss
from trl_promptkd.losses.chunked import chunked_sums
from trl_promptkd.models.forward import completion_states, forward_logits


FAMILIES = ["llama", "gpt2", "opt", *HEADS]
IDS, MASK, _ = pad(ROWS, "left")
LABELS = torch.where(MASK == 1, IDS, -100)
LABELS[:, 1:][MASK[:, :-1] == 0] = -100  # what padding predicts means nothing
LABELS[:, :4] = -100


def model_of(family, seed=0):
    if family in HEADS:
        model = tiny_model(family)
        if seed:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model
    return tiny_model(family, seed=seed)


def whole_logits(model, soft_prompt=None):
    """All logits at once, by the model's own forward."""
    return forward_logits(model, IDS, MASK, soft_prompt)[:, :-1][LABELS[:, 1:] != -100].float()


def sums(student, teacher, beta=1.0):
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return generalized_jsd(student, teacher, beta).sum(), entropy(student).sum(), kl_divergence(teacher, student).sum()


class TestAgainstThePlainPath:
    """Values to 1e-5, gradients to 1e-4, of what is computed from all logits at once."""

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        """Two rows at a time, within a chunk."""
        monkeypatch.setattr(chunked_loss, "_BLOCK", 2 * VOCAB_SIZE)

    @pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_the_student(self, family, chunk_size):
        student, teacher = model_of(family), model_of(family, seed=1)
        expected = sums(whole_logits(student), whole_logits(teacher).detach())
        names, parameters = zip(*student.named_parameters(), strict=True)
        expected_gradients = torch.autograd.grad(3 * expected[0], parameters, allow_unused=True)

        known = completion_states(student, IDS, MASK, LABELS)
        with torch.no_grad():
            judge = completion_states(teacher, IDS, MASK, LABELS).detach()
        values, (gradient,) = chunked_sums(sums, chunk_size, known, judge)
        torch.testing.assert_close(values, tuple(v.detach() for v in expected), rtol=1e-5, atol=1e-5)
        loss = 3 * gradient.attach(values[0])
        assert loss.item() == pytest.approx(3 * expected[0].item(), rel=1e-5)
        loss.backward()
        for name, parameter, want in zip(names, parameters, expected_gradients, strict=True):
            if want is None:
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(
                    parameter.grad, want, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
        assert all(p.grad is None for p in teacher.parameters())

    @pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_the_soft_prompt(self, family, beta):
        student, teacher = model_of(family), model_of(family, seed=1).requires_grad_(False)
        soft_prompt = (torch.randn(5, 32, generator=torch.manual_seed(0)) * 0.3).requires_grad_(True)
        value, *_ = sums(whole_logits(teacher, soft_prompt), whole_logits(student).detach(), beta)
        (expected,) = torch.autograd.grad(value, soft_prompt)

        prompted = completion_states(teacher, IDS, MASK, LABELS, soft_prompt)
        known = completion_states(student, IDS, MASK, LABELS).detach()
        (got, *_), (gradient,) = chunked_sums(lambda a, b: sums(a, b, beta), 3, prompted, known)
        assert got.item() == pytest.approx(value.item(), rel=1e-5)
        assert len(gradient.tensors) == 1  # the teacher's head is frozen
        gradient.attach(got).backward()
        torch.testing.assert_close(soft_prompt.grad, expected, rtol=1e-4, atol=1e-4)
        assert all(p.grad is None for p in student.parameters())

    def test_two_trained_parts_get_each_its_own(self):
        """PromptKD's step: both losses from the same logits."""
        student, teacher = tiny_model(seed=0), tiny_model(seed=1).requires_grad_(False)
        soft_prompt = torch.randn(5, 32, requires_grad=True)

        def both(a, b):
            return (sums(a, b.detach())[0] + sums(b, a.detach())[0],)

        a, b = whole_logits(student), whole_logits(teacher, soft_prompt)
        parameters = list(student.parameters())
        expected = torch.autograd.grad(sums(a, b.detach())[0], parameters)
        (expected_prompt,) = torch.autograd.grad(sums(b, a.detach())[0], soft_prompt)
        known = completion_states(student, IDS, MASK, LABELS)
        prompted = completion_states(teacher, IDS, MASK, LABELS, soft_prompt)
        values, (of_student, of_prompt) = chunked_sums(both, 4, known, prompted)
        of_student.attach(values[0]).backward()
        assert soft_prompt.grad is None
        of_prompt.attach(values[0]).backward()
        torch.testing.assert_close(soft_prompt.grad, expected_prompt, rtol=1e-4, atol=1e-4)
        for parameter, want in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-4)


class TestWhatIsTrained:
    def test_a_shared_part_of_the_vocabulary(self):
        model = tiny_model("llama")
        expected = torch.autograd.grad(whole_logits(model)[:, :30].logsumexp(-1).sum(), list(model.parameters()))
        known = completion_states(model, IDS, MASK, LABELS, vocab_size=30)
        values, (gradient,) = chunked_sums(lambda logits: (logits.logsumexp(-1).sum(),), 4, known)
        gradient.attach(values[0]).backward()
        for parameter, want in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-4)

    def test_a_gradient_is_handed_on_once(self):
        values, (gradient,) = chunked_sums(
            lambda logits: (logits.sum(),), 4, completion_states(tiny_model(), IDS, MASK, LABELS)
        )
        loss = gradient.attach(values[0])
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="handed on already"):
            loss.backward()

    def test_a_head_above_a_frozen_decoder(self):
        model = tiny_model("llama")
        model.requires_grad_(False)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        known = completion_states(model, IDS, MASK, LABELS)
        assert not known.states.requires_grad
        values, (gradient,) = chunked_sums(lambda logits: (logits.logsumexp(-1).sum(),), 4, known)
        gradient.attach(values[0]).backward()
        (expected,) = torch.autograd.grad(whole_logits(model).logsumexp(-1).sum(), model.lm_head.weight)
        torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-4)

    def test_lora_on_the_head(self):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        model = get_peft_model(tiny_model("llama"), config).eval()
        parameters = [p for p in model.parameters() if p.requires_grad]
        expected = torch.autograd.grad(whole_logits(model).logsumexp(-1).sum(), parameters)
        known = completion_states(model, IDS, MASK, LABELS)
        values, (gradient,) = chunked_sums(lambda logits: (logits.logsumexp(-1).sum(),), 4, known)
        gradient.attach(values[0]).backward()
        for parameter, want in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-4)

    def test_nothing_without_gradients(self):
        with torch.no_grad():
            known = completion_states(tiny_model(), IDS, MASK, LABELS)
            values, gradients = chunked_sums(lambda logits: (logits.sum(),), 4, known)
        assert gradients == []
        assert not values[0].requires_grad

    def test_no_tokens_give_zero_with_a_gradient_path(self):
        model = tiny_model()
        known = completion_states(model, IDS, MASK, torch.full_like(IDS, -100))
        values, (gradient,) = chunked_sums(lambda logits: (logits.logsumexp(-1).sum(),), 4, known)
        loss = gradient.attach(values[0])
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())

    def test_half_precision_gradients_are_added_up_in_float32(self):
        torch.manual_seed(0)
        model = tiny_model("llama", dtype=torch.bfloat16)
        known = completion_states(model, IDS, MASK, LABELS)
        values, (gradient,) = chunked_sums(lambda logits: (logits.logsumexp(-1).sum(),), 1, known)
        assert {g.dtype for g in gradient.gradients} == {torch.float32}
        gradient.attach(values[0]).backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


class TestChunks:
    def test_no_tensor_of_tokens_times_vocabulary(self):
        """The largest tensor that is made, forward and backward, has a chunk's rows and not the batch's."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Largest(TorchDispatchMode):
            rows = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                output = function(*args, **(kwargs or {}))
                for tensor in output if isinstance(output, (tuple, list)) else [output]:
                    if (
                        isinstance(tensor, torch.Tensor)
                        and tensor.ndim
                        and tensor.size(-1) == 257
                        and len(tensor) != 32
                    ):
                        self.rows = max(self.rows, tensor.numel() // 257)
                return output

        student, teacher = (tiny_model(vocab_size=257, seed=seed, tie_word_embeddings=False) for seed in (0, 1))
        known = completion_states(student, IDS, MASK, LABELS)
        prompted = completion_states(teacher, IDS, MASK, LABELS, torch.randn(5, 32, requires_grad=True))
        with Largest() as largest:
            values, (gradient, _) = chunked_sums(sums, 3, known, prompted)
            gradient.attach(values[0]).backward()
        assert largest.rows == 3
        assert len(known) > 9

    def test_tensors_are_sliced_and_none_is_passed_on(self):
        known = completion_states(tiny_model(), IDS, MASK, LABELS)
        weights = torch.arange(len(known)).float()
        seen = []

        def weighted(logits, weight, nothing):
            seen.append((len(logits), weight.tolist(), nothing))
            return ((weight * logits.logsumexp(-1)).sum(),)

        values, _ = chunked_sums(weighted, 4, known, weights, None)
        expected = (weights * known.logits().logsumexp(-1)).sum()
        assert values[0].item() == pytest.approx(expected.item(), rel=1e-5)
        assert [w for _, weight, _ in seen for w in weight] == weights.tolist()
        assert all(nothing is None for *_, nothing in seen)
