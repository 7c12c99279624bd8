import math

import pytest
import torch

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
    def test_reverse_is_trained_model_first(self, weight):
        loss, prompted_student, prompted_plain, student_plain = prompt_loss_sums(PP, Q, P, "reverse", weight)
        assert loss.item() == pytest.approx(KL_PP_Q + weight * KL_PP_P, abs=1e-6)
        assert prompted_student.item() == pytest.approx(KL_PP_Q, abs=1e-6)
        assert prompted_plain.item() == pytest.approx(KL_PP_P, abs=1e-6)
        assert student_plain.item() == pytest.approx(KL_PP_Q, abs=1e-6)  # token 2: (1/4, 3/4) against (1/2, 1/2)

    def test_forward_swaps_both_terms_and_logs_the_same(self):
        loss, prompted_student, prompted_plain, student_plain = prompt_loss_sums(PP, Q, P, "forward", 0.5)
        assert loss.item() == pytest.approx(KL_Q_PP + 0.5 * KL_P_PP, abs=1e-6)
        assert prompted_student.item() == pytest.approx(KL_PP_Q, abs=1e-6)
        assert prompted_plain.item() == pytest.approx(KL_PP_P, abs=1e-6)
        assert student_plain.item() == pytest.approx(KL_PP_Q, abs=1e-6)  # token 2: (1/4, 3/4) against (1/2, 1/2)

    def test_gradient_reaches_the_prompted_logits_only(self):
        tensors = [t.clone().requires_grad_(True) for t in (PP, Q, P)]
        prompt_loss_sums(*tensors)[0].backward()
        assert tensors[0].grad is not None
        assert tensors[1].grad is None
        assert tensors[2].grad is None

    def test_nothing_to_hold_on_to_where_the_weight_is_zero(self):
        loss, prompted_student, *_ = prompt_loss_sums(PP, Q, None, "reverse", 0.0)
        assert loss.item() == prompted_student.item() == pytest.approx(KL_PP_Q, abs=1e-6)


class TestStudentLoss:
    def test_values(self):
        loss, student_prompted, student_entropy, teacher_entropy = student_loss_sums(Q, PP)
        entropy_quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
        assert loss.item() == pytest.approx(KL_Q_PP, abs=1e-6)
        assert student_prompted.item() == pytest.approx(KL_Q_PP, abs=1e-6)
        assert student_entropy.item() == pytest.approx(math.log(2) + entropy_quarter, abs=1e-6)
        assert teacher_entropy.item() == pytest.approx(2 * entropy_quarter, abs=1e-6)

    def test_beta_zero_is_the_forward_kl(self):
        loss, student_prompted, *_ = student_loss_sums(Q, PP, beta=0.0)
        assert loss.item() == pytest.approx(KL_PP_Q, abs=1e-6)
        assert student_prompted.item() == pytest.approx(KL_Q_PP, abs=1e-6)

    def test_gradient_reaches_the_student_only(self):
        tensors = [t.clone().requires_grad_(True) for t in (Q, PP)]
        student_loss_sums(*tensors)[0].backward()
        assert tensors[0].grad is not None
        assert tensors[1].grad is None


class TestBothLosses:
    @pytest.mark.parametrize("plain", [P, None])
    def test_together_they_are_what_they_are_alone(self, plain):
        weight = 0.0 if plain is None else 0.5
        both = promptkd_loss_sums(Q, PP, plain, weight=weight, beta=0.0)
        of_prompt, of_student = prompt_loss_sums(PP, Q, plain, weight=weight), student_loss_sums(Q, PP, beta=0.0)
        torch.testing.assert_close(both[1:], (*of_prompt, *of_student))
        assert both.loss.item() == pytest.approx(of_prompt.prompt_loss.item() + of_student.student_loss.item())
        for losses, alone in (("prompt", of_prompt.prompt_loss), ("student", of_student.student_loss)):
            one = promptkd_loss_sums(Q, PP, plain, losses=losses, weight=weight, beta=0.0)
            torch.testing.assert_close(one.loss, alone)

    def test_their_gradients_do_not_mix(self):
        q, pp = (t.clone().requires_grad_(True) for t in (Q, PP))
        got = torch.autograd.grad(promptkd_loss_sums(q, pp, P).loss, (q, pp))
        (of_student,) = torch.autograd.grad(promptkd_loss_sums(q, pp, P, losses="student").loss, q)
        (of_prompt,) = torch.autograd.grad(promptkd_loss_sums(q, pp, P, losses="prompt").loss, pp)
        torch.testing.assert_close(got, (of_student, of_prompt))

    def test_temperature_divides_the_logits(self):
        at_two = promptkd_loss_sums(2 * Q, 2 * PP, 2 * P, temperature=2.0)
        torch.testing.assert_close(at_two, promptkd_loss_sums(Q, PP, P))


class TestRegularizationWeight:
    def test_linear_counts_the_steps_done_from_zero(self):
        assert [regularization_weight(2.0, "linear", t, 4) for t in range(4)] == [2.0, 1.5, 1.0, 0.5]

    def test_constant_stays(self):
        assert regularization_weight(0.7, "constant", 3, 4) == 0.7
