import pytest
import torch
from padding import ROWS, pad
from peft import LoraConfig, get_peft_model
from tiny import HEADS, VOCAB_SIZE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

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


def states(model, soft_prompt=None, labels=LABELS, vocab_size=None):
    return completion_states(model, IDS, MASK, labels, soft_prompt, vocab_size)


def losses_of(function, chunk_size, *parts):
    """The values of `function`, and for each trained part a loss, which is the first of them and has its gradient."""
    values, gradients = chunked_sums(function, chunk_size, *parts)
    return values, [gradient.attach(values[0]) for gradient in gradients]


def logsumexp(logits):
    return (logits.logsumexp(-1).sum(),)


def assert_gradients(parameters, expected):
    for parameter, want in zip(parameters, expected, strict=True):
        if want is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-4)


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
        parameters = list(student.parameters())
        expected_gradients = torch.autograd.grad(3 * expected[0], parameters, allow_unused=True)
        with torch.no_grad():
            judge = states(teacher).detach()
        values, (loss,) = losses_of(sums, chunk_size, states(student), judge)
        torch.testing.assert_close(values, tuple(v.detach() for v in expected), rtol=1e-5, atol=1e-5)
        assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
        (3 * loss).backward()
        assert_gradients(parameters, expected_gradients)
        assert all(p.grad is None for p in teacher.parameters())

    @pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_the_soft_prompt(self, family, beta):
        student, teacher = model_of(family), model_of(family, seed=1).requires_grad_(False)
        soft_prompt = (torch.randn(5, 32, generator=torch.manual_seed(0)) * 0.3).requires_grad_(True)
        value, *_ = sums(whole_logits(teacher, soft_prompt), whole_logits(student).detach(), beta)
        expected = torch.autograd.grad(value, [soft_prompt])
        parts = states(teacher, soft_prompt), states(student).detach()
        (got, *_), (loss,) = losses_of(lambda a, b: sums(a, b, beta), 3, *parts)
        assert got.item() == pytest.approx(value.item(), rel=1e-5)
        loss.backward()
        assert_gradients([soft_prompt], expected)
        assert all(p.grad is None for model in (student, teacher) for p in model.parameters())

    def test_two_trained_parts_get_each_its_own(self):
        """PromptKD's step: both losses from the same logits."""
        student, teacher = tiny_model(seed=0), tiny_model(seed=1).requires_grad_(False)
        soft_prompt = torch.randn(5, 32, requires_grad=True)

        def both(a, b):
            return (sums(a, b.detach())[0] + sums(b, a.detach())[0],)

        a, b = whole_logits(student), whole_logits(teacher, soft_prompt)
        parameters = list(student.parameters())
        expected = torch.autograd.grad(sums(a, b.detach())[0], parameters)
        expected_prompt = torch.autograd.grad(sums(b, a.detach())[0], [soft_prompt])
        _, (of_student, of_prompt) = losses_of(both, 4, states(student), states(teacher, soft_prompt))
        of_student.backward()
        assert soft_prompt.grad is None
        of_prompt.backward()
        assert_gradients([soft_prompt], expected_prompt)
        assert_gradients(parameters, expected)


def head_above_a_frozen_decoder():
    model = tiny_model().requires_grad_(False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    return model


def lora_on_the_head():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model(), config).eval()


class TestWhatIsTrained:
    @pytest.mark.parametrize(
        ("make", "vocab_size"), [(tiny_model, 30), (head_above_a_frozen_decoder, None), (lora_on_the_head, None)]
    )
    def test_weights_that_require_a_gradient_get_theirs(self, make, vocab_size):
        """`vocab_size`: a part of the vocabulary that both models share."""
        model = make()
        parameters = [p for p in model.parameters() if p.requires_grad]
        expected = torch.autograd.grad(logsumexp(whole_logits(model)[:, :vocab_size])[0], parameters)
        _, (loss,) = losses_of(logsumexp, 4, states(model, vocab_size=vocab_size))
        loss.backward()
        assert_gradients(parameters, expected)

    def test_a_gradient_is_handed_on_once(self):
        _, (loss,) = losses_of(logsumexp, 4, states(tiny_model()))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="handed on already"):
            loss.backward()

    def test_nothing_without_gradients(self):
        with torch.no_grad():
            values, losses = losses_of(logsumexp, 4, states(tiny_model()))
        assert losses == []
        assert not values[0].requires_grad

    def test_no_tokens_give_zero_with_a_gradient_path(self):
        model = tiny_model()
        _, (loss,) = losses_of(logsumexp, 4, states(model, labels=torch.full_like(IDS, -100)))
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())

    def test_half_precision_gradients_are_added_up_in_float32(self):
        model = tiny_model(dtype=torch.bfloat16)
        values, (gradient,) = chunked_sums(logsumexp, 1, states(model))
        assert {g.dtype for g in gradient.gradients} == {torch.float32}
        gradient.attach(values[0]).backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


class TestChunks:
    def test_no_tensor_of_tokens_times_vocabulary(self):
        """The largest tensor that is made, forward and backward, has a chunk's rows and not the batch's."""

        class Largest(TorchDispatchMode):
            rows = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                output = function(*args, **(kwargs or {}))
                for tensor in output if isinstance(output, (tuple, list)) else [output]:
                    shape = getattr(tensor, "shape", ())
                    if shape and shape[-1] == 257 and shape[0] != 32:  # not the head's weights
                        self.rows = max(self.rows, tensor.numel() // 257)
                return output

        student, teacher = (tiny_model(vocab_size=257, seed=seed, tie_word_embeddings=False) for seed in (0, 1))
        known = states(student)
        prompted = states(teacher, torch.randn(5, 32, requires_grad=True))
        with Largest() as largest:
            _, (loss, _) = losses_of(sums, 3, known, prompted)
            loss.backward()
        assert largest.rows == 3
        assert len(known) > 9

    def test_tensors_are_sliced_and_none_is_passed_on(self):
        known = states(tiny_model())
        weights = torch.arange(len(known)).float()
        seen = []

        def weighted(logits, weight, nothing):
            seen.extend(weight.tolist())
            assert nothing is None
            return ((weight * logits.logsumexp(-1)).sum(),)

        (value,), _ = losses_of(weighted, 4, known, weights, None)
        assert value.item() == pytest.approx((weights * known.logits().logsumexp(-1)).sum().item(), rel=1e-5)
        assert seen == weights.tolist()
