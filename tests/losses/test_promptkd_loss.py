import math

import pytest
import torch

from trl_promptkd.divergences import kl_divergence
from trl_promptkd.losses.promptkd import (
    prompt_loss_sums,
    promptkd_loss_sums,
    regularization_weight,
    student_loss_sums,
)


# Two tokens, two words: probabilities (1/2, 1/2) and (1/4, 3/4), ...
Q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
PP = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
P = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
KL_PP_Q = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)  # token 1 only; token 2 is equal
KL_Q_PP = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
KL_PP_P = 2 * KL_PP_Q
KL_P_PP = 2 * KL_Q_PP


class TestPromptLoss:
    @pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize(
        ("direction", "first", "second"), [("reverse", KL_PP_Q, KL_PP_P), ("forward", KL_Q_PP, KL_P_PP)]
    )
    def test_directions_swap_both_terms_and_log_the_same(self, direction, first, second, weight):
        """`reverse`: the model that is trained comes first."""
        loss, prompted_student, prompted_plain, student_plain = prompt_loss_sums(PP, Q, P, direction, weight)
        assert loss.item() == pytest.approx(first + weight * second, abs=1e-6)
        assert prompted_student.item() == pytest.approx(KL_PP_Q, abs=1e-6)
        assert prompted_plain.item() == pytest.approx(KL_PP_P, abs=1e-6)
        assert student_plain.item() == pytest.approx(KL_PP_Q, abs=1e-6)  # token 2: (1/4, 3/4) against (1/2, 1/2)

    def test_gradient_reaches_the_prompted_logits_only(self):
        tensors = [t.clone().requires_grad_(True) for t in (PP, Q, P)]
        prompt_loss_sums(*tensors)[0].backward()
        assert [t.grad is not None for t in tensors] == [True, False, False]

    def test_nothing_to_hold_on_to_where_the_weight_is_zero(self):
        loss, prompted_student, *_ = prompt_loss_sums(PP, Q, None, "reverse", 0.0)
        assert loss.item() == prompted_student.item() == pytest.approx(KL_PP_Q, abs=1e-6)


class TestIdealPrompt:
    """docs/losses.md, "What an ideal prompt would do": the prompted teacher may be any distribution."""

    @pytest.fixture
    def logits(self):
        """Of student and plain teacher: four tokens, seven words."""
        return torch.randn(2, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def best_prompted(self, q, p, weight):
        """The minimiser of the prompt's loss over logits, found without knowing it."""
        prompted = torch.zeros_like(q, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [prompted], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = prompt_loss_sums(prompted.log_softmax(-1), q, p, "reverse", weight).prompt_loss
            loss.backward()
            return loss

        optimizer.step(closure)
        return prompted.detach().log_softmax(-1)

    @pytest.mark.parametrize("weight", [1.0, 0.5, 0.1])
    def test_is_the_geometric_mean_of_student_and_teacher(self, logits, weight):
        q, p = logits.log_softmax(-1)
        expected = (q / (1 + weight) + p * weight / (1 + weight)).log_softmax(-1)
        torch.testing.assert_close(self.best_prompted(q, p, weight), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("weight", "ratio"), [(1.0, 0.5), (0.5, 0.333), (0.1, 0.091)])
    def test_gives_the_student_the_gradient_of_gkd_made_smaller(self, logits, weight, ratio):
        q, p = logits.log_softmax(-1)
        prompted = self.best_prompted(q, p, weight)
        student = logits[0].clone().requires_grad_(True)
        (of_promptkd,) = torch.autograd.grad(
            student_loss_sums(student.log_softmax(-1), prompted).student_loss, student
        )
        (of_gkd,) = torch.autograd.grad(kl_divergence(student.log_softmax(-1), p).sum(), student)
        torch.testing.assert_close(of_promptkd, of_gkd * weight / (1 + weight), atol=1e-6, rtol=0)
        torch.testing.assert_close(of_promptkd, of_gkd * ratio, atol=5e-4, rtol=0)


class TestStudentLoss:
    @pytest.mark.parametrize(("beta", "expected"), [(1.0, KL_Q_PP), (0.0, KL_PP_Q)])
    def test_values(self, beta, expected):
        loss, student_prompted, student_entropy, teacher_entropy = student_loss_sums(Q, PP, beta)
        entropy_quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert student_prompted.item() == pytest.approx(KL_Q_PP, abs=1e-6)
        assert student_entropy.item() == pytest.approx(math.log(2) + entropy_quarter, abs=1e-6)
        assert teacher_entropy.item() == pytest.approx(2 * entropy_quarter, abs=1e-6)

    def test_gradient_reaches_the_student_only(self):
        tensors = [t.clone().requires_grad_(True) for t in (Q, PP)]
        student_loss_sums(*tensors)[0].backward()
        assert [t.grad is not None for t in tensors] == [True, False]


class TestBothLosses:
    """Their values are in test_promptkd_trainer.py, against rows alone."""

    def test_their_gradients_do_not_mix(self):
        q, pp = (t.clone().requires_grad_(True) for t in (Q, PP))
        total = promptkd_loss_sums(q, pp, P).loss
        got = torch.autograd.grad(total, (q, pp))
        (of_student,) = torch.autograd.grad(promptkd_loss_sums(q, pp, P, losses="student").loss, q)
        (of_prompt,) = torch.autograd.grad(promptkd_loss_sums(q, pp, P, losses="prompt").loss, pp)
        torch.testing.assert_close(got, (of_student, of_prompt))

    def test_are_what_they_are_alone(self):
        both = promptkd_loss_sums(Q, PP, P, weight=0.5, beta=0.0)
        alone = (*prompt_loss_sums(PP, Q, P, weight=0.5), *student_loss_sums(Q, PP, beta=0.0))
        torch.testing.assert_close(both[1:], alone)
        assert both.loss.item() == pytest.approx(both.prompt_loss.item() + both.student_loss.item())

    def test_temperature_divides_the_logits(self):
        at_two = promptkd_loss_sums(2 * Q, 2 * PP, 2 * P, temperature=2.0)
        torch.testing.assert_close(at_two, promptkd_loss_sums(Q, PP, P))

    def test_ruled_out_tokens_are_left_out(self):
        """Six tokens, two of which the teacher rules out: the loss is that of the other four."""
        torch.manual_seed(0)
        student, *teachers = torch.randn(3, 5, 6)
        left = [0, 1, 3, 5]
        masked = [part.index_fill(-1, torch.tensor([2, 4]), -math.inf) for part in teachers]
        found = promptkd_loss_sums(student, *masked)
        known = [part[:, left] for part in (student, *teachers)]
        torch.testing.assert_close(found, promptkd_loss_sums(*known))


class TestRegularizationWeight:
    def test_linear_counts_the_steps_done_from_zero(self):
        assert [regularization_weight(2.0, "linear", t, 4) for t in range(4)] == [2.0, 1.5, 1.0, 0.5]

    def test_constant_stays(self):
        assert regularization_weight(0.7, "constant", 3, 4) == 0.7
