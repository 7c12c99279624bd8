import math

import pytest
import torch

from trl_promptkd.divergences import entropy
from trl_promptkd.losses.primed_distill import primed_loss_sums


def log(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


HALF, QUARTERS = (0.5, 0.5), (0.75, 0.25)


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


class TestByHand:
    """The token is the second one."""

    Q, P, TOKEN = log(*HALF), log(*QUARTERS), torch.tensor([1])

    def test_terms_at_temperature_one(self):
        sums = primed_loss_sums(self.Q, self.P, self.TOKEN, alpha=0.25, temperature=1.0)
        assert sums.cross_entropy == pytest.approx(math.log(2))
        assert sums.divergence == pytest.approx(kl(HALF, QUARTERS))
        assert sums.loss == pytest.approx(0.25 * math.log(2) + 0.75 * kl(HALF, QUARTERS))
        assert sums.student_entropy == pytest.approx(math.log(2))
        assert sums.teacher_entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
        assert sums.teacher_log_prob == pytest.approx(math.log(0.25))

    def test_temperature_divides_logits_and_scales_by_its_square(self):
        # At temperature 2, p is proportional to (sqrt(3), 1)
        p = math.sqrt(3) / (1 + math.sqrt(3))
        reverse = kl(HALF, (p, 1 - p))
        sums = primed_loss_sums(self.Q, self.P, self.TOKEN, alpha=0.25, temperature=2.0)
        assert sums.divergence == pytest.approx(reverse)
        assert sums.loss == pytest.approx(0.25 * math.log(2) + 0.75 * 4 * reverse)
        assert sums.cross_entropy == pytest.approx(math.log(2))

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"beta": 1.0}, kl(HALF, QUARTERS)),
            ({"beta": 0.0}, kl(QUARTERS, HALF)),
            ({"beta": 0.5}, 0.5 * kl(QUARTERS, (0.625, 0.375)) + 0.5 * kl(HALF, (0.625, 0.375))),
            ({"beta": 1.0, "skew": 0.2}, kl(HALF, (0.2 * 0.5 + 0.8 * 0.75, 0.2 * 0.5 + 0.8 * 0.25))),
            ({"beta": 0.0, "skew": 0.2}, kl(QUARTERS, (0.2 * 0.75 + 0.8 * 0.5, 0.2 * 0.25 + 0.8 * 0.5))),
        ],
    )
    def test_beta_chooses_the_divergence_and_skew_mixes_its_first_into_its_second(self, settings, expected):
        sums = primed_loss_sums(self.Q, self.P, self.TOKEN, alpha=0.0, temperature=1.0, **settings)
        assert sums.loss == pytest.approx(expected)
        assert sums.student_teacher == pytest.approx(kl(HALF, QUARTERS))

    def test_agreement_and_accuracy_count_tokens(self):
        q = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 3.0]])
        p = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        sums = primed_loss_sums(q, p, torch.tensor([0, 1, 1]), alpha=0.5, temperature=3.0)
        assert (sums.agreement, sums.accuracy) == (2, 2)


class TestProperties:
    @pytest.mark.parametrize(("beta", "skew"), [(1.0, 0.0), (0.0, 0.0), (0.5, 0.0), (1.0, 0.1), (0.0, 0.1)])
    def test_gradient_goes_to_the_student_and_is_right(self, beta, skew):
        torch.manual_seed(0)
        q = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
        p = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
        tokens = torch.tensor([0, 3, 6])

        def loss(logits):
            return primed_loss_sums(logits, p, tokens, alpha=0.3, temperature=2.0, beta=beta, skew=skew).loss

        assert torch.autograd.gradcheck(loss, (q,))
        loss(q).backward()
        assert q.grad.abs().sum() > 0
        assert p.grad is None

    def test_what_draws_lack_in_entropy_is_put_back(self):
        torch.manual_seed(0)
        q, drawn, tokens = torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 7, (5,))
        settings = {"alpha": 0.3, "temperature": 1.0, "beta": 0.0}
        plain = primed_loss_sums(q, drawn, tokens, **settings)
        true = entropy(drawn.log_softmax(-1)) + torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
        mended = primed_loss_sums(q, drawn, tokens, true, **settings)
        assert mended.divergence.item() == pytest.approx(plain.divergence.item() - 1.0, abs=1e-5)
        assert mended.loss.item() == pytest.approx(plain.loss.item() - 0.7, abs=1e-5)

    def test_draws_of_some_tokens_leave_the_others_as_they_are(self):
        torch.manual_seed(0)
        q, p, tokens = torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 7, (5,))
        settings = {"alpha": 0.0, "temperature": 1.0, "beta": 0.0}
        true = entropy(p.log_softmax(-1)) + 0.5
        some = torch.where(torch.tensor([True, False, True, False, False]), true, torch.nan)
        plain, mended = (primed_loss_sums(q, p, tokens, given, **settings).loss for given in (None, some))
        assert mended.item() == pytest.approx(plain.item() - 1.0, abs=1e-5)

    @pytest.mark.parametrize(("beta", "skew"), [(1.0, 0.0), (0.0, 0.0), (1.0, 0.1)])
    def test_each_teachers_sums_are_those_of_its_tokens_alone(self, beta, skew):
        torch.manual_seed(0)
        q, p, tokens = torch.randn(6, 7), torch.randn(6, 7), torch.randint(0, 7, (6,))
        teachers = torch.tensor([2, 0, 0, 2, 2, 0])
        settings = {"alpha": 0.3, "temperature": 2.0, "beta": beta, "skew": skew}
        whole = primed_loss_sums(q, p, tokens, None, teachers, num_teachers=3, **settings)
        for number in range(3):
            own = teachers == number
            alone = primed_loss_sums(q[own], p[own], tokens[own], **settings)
            expected = [own.sum(), alone.student_teacher, alone.agreement, alone.teacher_log_prob]
            assert whole.of_teachers[number].tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)
        plain = primed_loss_sums(q, p, tokens, **settings)
        assert plain.of_teachers.shape == (0, 4)
        assert whole.loss == plain.loss

    def test_no_tokens_make_a_loss_of_zero_with_a_gradient_path(self):
        q = torch.randn(0, 7, requires_grad=True)
        loss = primed_loss_sums(
            q, torch.randn(0, 7), torch.zeros(0, dtype=torch.long), alpha=0.5, temperature=2.0
        ).loss
        loss.backward()
        assert loss == 0

    @pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
    def test_ruled_out_tokens_are_left_out_but_for_the_hard_labels(self, beta):
        """Six tokens, two of which the teacher rules out: the divergence is that of the other four."""
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 5, 6)
        left, tokens = [0, 1, 3, 5], torch.tensor([0, 1, 1, 0, 1])
        settings = {"alpha": 0.4, "temperature": 2.0, "beta": beta}
        masked = teacher.index_fill(-1, torch.tensor([2, 4]), -math.inf)
        found = primed_loss_sums(student, masked, tokens, **settings)
        expected = primed_loss_sums(student[:, left], teacher[:, left], tokens, **settings)
        for name in ("divergence", "student_teacher", "teacher_log_prob"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        all_tokens = -student.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum()
        torch.testing.assert_close(found.cross_entropy, all_tokens)
