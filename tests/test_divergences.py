import math

import pytest
import torch

from trl_promptkd.divergences import (
    entropy,
    forward_kl,
    generalized_jsd,
    kl_divergence,
    reverse_kl,
)


STUDENT = torch.tensor([0.5, 0.25, 0.25]).log()
TEACHER = torch.tensor([0.25, 0.25, 0.5]).log()


class TestByHand:
    def test_reverse_kl_is_kl_of_the_student_from_the_teacher(self):
        # 0.5 ln(0.5/0.25) + 0.25 ln 1 + 0.25 ln(0.25/0.5) = 0.25 ln 2
        assert reverse_kl(STUDENT, TEACHER).item() == pytest.approx(0.25 * math.log(2), abs=1e-7)

    def test_directions_differ_where_they_should(self):
        student = torch.tensor([0.9, 0.1]).log()
        teacher = torch.tensor([0.5, 0.5]).log()
        assert forward_kl(student, teacher).item() == pytest.approx(
            0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), abs=1e-6
        )
        assert reverse_kl(student, teacher).item() == pytest.approx(
            0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6
        )

    def test_jsd_at_one_half(self):
        # mixture (.375, .25, .375): both halves equal .5 ln(4/3) + .25 ln(2/3)
        half = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
        assert generalized_jsd(STUDENT, TEACHER, 0.5).item() == pytest.approx(half, abs=1e-7)

    def test_jsd_weights_the_teacher_by_beta(self):
        student, teacher = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
        mixture = [0.2 * 0.5 + 0.8 * 0.9, 0.2 * 0.5 + 0.8 * 0.1]
        expected = 0.2 * sum(0.5 * math.log(0.5 / m) for m in mixture)
        expected += 0.8 * (0.9 * math.log(0.9 / mixture[0]) + 0.1 * math.log(0.1 / mixture[1]))
        assert generalized_jsd(student, teacher, 0.2).item() == pytest.approx(expected, abs=1e-7)

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
