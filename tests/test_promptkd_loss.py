import math

import pytest
import torch

from trl_promptkd.promptkd_loss import prompt_loss_sums, regularization_weight, student_loss_sums


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
        loss, prompted_student, prompted_plain = prompt_loss_sums(PP, Q, P, "reverse", weight)
        assert loss.item() == pytest.approx(KL_PP_Q + weight * KL_PP_P, abs=1e-6)
        assert prompted_student.item() == pytest.approx(KL_PP_Q, abs=1e-6)
        assert prompted_plain.item() == pytest.approx(KL_PP_P, abs=1e-6)

    def test_forward_swaps_both_terms_and_logs_the_same(self):
        loss, prompted_student, prompted_plain = prompt_loss_sums(PP, Q, P, "forward", 0.5)
        assert loss.item() == pytest.approx(KL_Q_PP + 0.5 * KL_P_PP, abs=1e-6)
        assert prompted_student.item() == pytest.approx(KL_PP_Q, abs=1e-6)
        assert prompted_plain.item() == pytest.approx(KL_PP_P, abs=1e-6)

    def test_gradient_reaches_the_prompted_logits_only(self):
        tensors = [t.clone().requires_grad_(True) for t in (PP, Q, P)]
        prompt_loss_sums(*tensors)[0].backward()
        assert tensors[0].grad is not None
        assert tensors[1].grad is None
        assert tensors[2].grad is None

    def test_temperature_divides_the_logits(self):
        at_two = prompt_loss_sums(2 * PP, 2 * Q, 2 * P, temperature=2.0)
        torch.testing.assert_close(at_two, prompt_loss_sums(PP, Q, P))


class TestStudentLoss:
    def test_values(self):
        loss, student_prompted, student_entropy, teacher_entropy, student_plain = student_loss_sums(Q, PP, P)
        entropy_quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
        assert loss.item() == pytest.approx(KL_Q_PP, abs=1e-6)
        assert student_prompted.item() == pytest.approx(KL_Q_PP, abs=1e-6)
        assert student_entropy.item() == pytest.approx(math.log(2) + entropy_quarter, abs=1e-6)
        assert teacher_entropy.item() == pytest.approx(2 * entropy_quarter, abs=1e-6)
        assert student_plain.item() == pytest.approx(KL_PP_Q, abs=1e-6)  # token 2: (1/4, 3/4) against (1/2, 1/2)

    def test_beta_zero_is_the_forward_kl(self):
        loss, student_prompted, *_ = student_loss_sums(Q, PP, None, beta=0.0)
        assert loss.item() == pytest.approx(KL_PP_Q, abs=1e-6)
        assert student_prompted.item() == pytest.approx(KL_Q_PP, abs=1e-6)

    def test_gradient_reaches_the_student_only(self):
        tensors = [t.clone().requires_grad_(True) for t in (Q, PP, P)]
        student_loss_sums(*tensors)[0].backward()
        assert tensors[0].grad is not None
        assert tensors[1].grad is None
        assert tensors[2].grad is None


class TestRegularizationWeight:
    def test_linear_counts_the_steps_done_from_zero(self):
        assert [regularization_weight(2.0, "linear", t, 4) for t in range(4)] == [2.0, 1.5, 1.0, 0.5]

    def test_constant_stays(self):
        assert regularization_weight(0.7, "constant", 3, 4) == 0.7
