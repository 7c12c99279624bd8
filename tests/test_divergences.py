import math
from functools import partial

import pytest
import torch

from trl_promptkd.divergences import (
    entropy,
    forward_kl,
    generalized_jsd,
    kl_divergence,
    on_shared_support,
    reverse_kl,
    skewed_kl,
)


STUDENT = torch.tensor([0.5, 0.25, 0.25]).log()
TEACHER = torch.tensor([0.25, 0.25, 0.5]).log()
SURE, UNSURE = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()


class TestByHand:
    def test_reverse_kl_is_kl_of_the_student_from_the_teacher(self):
        # 0.5 ln(0.5/0.25) + 0.25 ln 1 + 0.25 ln(0.25/0.5) = 0.25 ln 2
        assert reverse_kl(STUDENT, TEACHER).item() == pytest.approx(0.25 * math.log(2), abs=1e-7)

    def test_directions_differ_where_they_should(self):
        forward, reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
        assert forward_kl(SURE, UNSURE).item() == pytest.approx(forward, abs=1e-6)
        assert reverse_kl(SURE, UNSURE).item() == pytest.approx(reverse, abs=1e-6)

    def test_jsd_at_one_half(self):
        # mixture (.375, .25, .375): both halves equal .5 ln(4/3) + .25 ln(2/3)
        half = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
        assert generalized_jsd(STUDENT, TEACHER, 0.5).item() == pytest.approx(half, abs=1e-7)

    def test_jsd_weights_the_teacher_by_beta(self):
        mixture = [0.2 * 0.5 + 0.8 * 0.9, 0.2 * 0.5 + 0.8 * 0.1]
        expected = 0.2 * sum(0.5 * math.log(0.5 / m) for m in mixture)
        expected += 0.8 * (0.9 * math.log(0.9 / mixture[0]) + 0.1 * math.log(0.1 / mixture[1]))
        assert generalized_jsd(SURE, UNSURE, 0.2).item() == pytest.approx(expected, abs=1e-7)

    def test_entropy(self):
        assert entropy(STUDENT).item() == pytest.approx(1.5 * math.log(2), abs=1e-7)


class TestProperties:
    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    def test_equal_inputs_give_zero(self, beta):
        log_probs = torch.randn(4, 7).log_softmax(-1)
        assert generalized_jsd(log_probs, log_probs, beta).abs().max() < 1e-6

    def test_jsd_ends_are_the_kls(self):
        student, teacher = torch.randn(2, 5, 9).log_softmax(-1)
        torch.testing.assert_close(generalized_jsd(student, teacher, 0.0), kl_divergence(teacher, student))
        torch.testing.assert_close(generalized_jsd(student, teacher, 1.0), kl_divergence(student, teacher))

    def test_jsd_near_one_is_not_the_reverse_kl(self):
        student, teacher = torch.randn(2, 5, 9).log_softmax(-1)
        assert (generalized_jsd(student, teacher, 0.999) < 0.02 * reverse_kl(student, teacher)).all()

    @pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
    def test_gradient(self, beta):
        student, teacher = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
        student.requires_grad_(True)
        assert torch.autograd.gradcheck(
            lambda x: generalized_jsd(x.log_softmax(-1), teacher.log_softmax(-1), beta), [student]
        )


class TestOnSharedSupport:
    """Two of four tokens are ruled out: one by each model."""

    A = torch.tensor([[1.0, 2.0, -math.inf, 0.0]])

    def test_nothing_ruled_out_changes_nothing(self):
        a, b = torch.randn(3, 5), torch.randn(3, 5)
        assert all(x is y for x, y in zip(on_shared_support(a, b), (a, b), strict=True))
        assert on_shared_support(torch.zeros(0, 5))[0].shape == (0, 5)

    @pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min])
    def test_both_are_compared_on_what_both_allow(self, lowest):
        b = torch.tensor([[0.5, 0.0, 3.0, lowest]])
        log_a, log_b = (part.log_softmax(dim=-1) for part in on_shared_support(self.A, b))
        hand_a, hand_b = self.A[:, :2].log_softmax(dim=-1), b[:, :2].log_softmax(dim=-1)
        for measure in (forward_kl, reverse_kl, partial(generalized_jsd, beta=0.3), partial(skewed_kl, skew=0.1)):
            torch.testing.assert_close(measure(log_a, log_b), measure(hand_a, hand_b))
        torch.testing.assert_close(entropy(log_a), entropy(hand_a))

    def test_no_gradient_reaches_what_is_ruled_out(self):
        a = self.A.clone().requires_grad_(True)
        b = torch.tensor([[0.5, 0.0, 3.0, -math.inf]])
        log_a, log_b = (part.log_softmax(dim=-1) for part in on_shared_support(a, b))
        reverse_kl(log_a, log_b).sum().backward()
        hand = self.A[:, :2].clone().requires_grad_(True)
        reverse_kl(hand.log_softmax(dim=-1), b[:, :2].log_softmax(dim=-1)).sum().backward()
        torch.testing.assert_close(a.grad[:, :2], hand.grad)
        assert a.grad[:, 2:].tolist() == [[0.0, 0.0]]

    def test_nan_stays(self):
        a, b = on_shared_support(torch.tensor([[math.nan, 1.0]]), torch.zeros(1, 2))
        assert reverse_kl(a.log_softmax(dim=-1), b.log_softmax(dim=-1)).isnan()
