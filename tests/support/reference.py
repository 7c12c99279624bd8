"""Both methods written a second time: row by row, without padding, cache, chunks or any code of the package."""

import math
from fractions import Fraction
from itertools import accumulate

import torch


def log_probs(model, ids, first, soft_prompt=None):
    """Log-probabilities (len(ids) - first, vocab) of the tokens from position `first` on."""
    ids = torch.tensor([ids])
    if soft_prompt is None:
        logits = model(input_ids=ids).logits[0]
    else:
        embeds = torch.cat([soft_prompt.unsqueeze(0), model.get_input_embeddings()(ids).detach()], dim=1)
        logits = model(inputs_embeds=embeds).logits[0, soft_prompt.size(0) :]
    return torch.log_softmax(logits[first - 1 : -1], dim=-1)


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum()


@torch.no_grad()
def greedy(model, prompt, max_new_tokens, eos, soft_prompt=None):
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(log_probs(model, [*ids, 0], len(ids), soft_prompt).argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def promptkd_step(
    student,
    teacher,
    soft_prompt,
    micro_batches,
    learning_rate,
    prompt_learning_rate,
    prompt_update="sequential",
    direction="reverse",
    weight=1.0,
    max_grad_norm=1.0,
    share=1.0,
):
    """One step on a window; changes `student` (by SGD) and `soft_prompt` (by AdamW) in place.

    `micro_batches`: lists of (prompt ids, completion ids). `share`: of their rows, whose first ones teach the prompt.
    Returns the student's loss and the norms of the prompt's and the student's gradients.
    """
    rows = [row for batch in micro_batches for row in batch]
    num_tokens = sum(len(completion) for _, completion in rows)
    teaching = rows[: math.ceil(Fraction(str(share)) * len(rows))]
    num_teaching = sum(len(completion) for _, completion in teaching)
    steps_at = next(i for i, end in enumerate(accumulate(map(len, micro_batches))) if end >= len(teaching))
    student.requires_grad_(True).zero_grad()
    teacher.requires_grad_(False)
    soft_prompt.requires_grad_(True)

    prompt_loss = 0
    for prompt, completion in teaching:
        ids, first = prompt + completion, len(prompt)
        with torch.no_grad():
            q, p = log_probs(student, ids, first), log_probs(teacher, ids, first)
        prompted = log_probs(teacher, ids, first, soft_prompt)
        if direction == "reverse":
            prompt_loss = prompt_loss + kl(prompted, q) + weight * kl(prompted, p)
        else:
            prompt_loss = prompt_loss + kl(q, prompted) + weight * kl(p, prompted)
    (gradient,) = torch.autograd.grad(prompt_loss / num_teaching, [soft_prompt])
    before = soft_prompt.detach().clone()
    prompt_norm = float(gradient.norm())
    soft_prompt.grad = gradient * min(1.0, max_grad_norm / (prompt_norm + 1e-6))
    torch.optim.AdamW([soft_prompt], lr=prompt_learning_rate, weight_decay=0.01).step()
    after = soft_prompt.detach()

    student_loss = 0
    for index, batch in enumerate(micro_batches):
        sees_new = prompt_update == "sequential" and index >= steps_at
        for prompt, completion in batch:
            ids, first = prompt + completion, len(prompt)
            with torch.no_grad():
                prompted = log_probs(teacher, ids, first, after if sees_new else before)
            student_loss = student_loss + kl(log_probs(student, ids, first), prompted)
    student_loss = student_loss / num_tokens
    norm = sgd_step(student, student_loss, learning_rate, max_grad_norm)
    return float(student_loss.detach()), prompt_norm, norm


def primed_loss(student, teacher, rows, alpha, temperature, beta=1.0, skew=0.0):
    """Sums over the tokens of `rows`: (prompt ids, teacher prompt ids, completion ids). The loss has a gradient."""
    total = dict.fromkeys(
        ("loss", "ce", "kd", "kl", "student_entropy", "teacher_entropy", "agree", "right", "gain"), 0.0
    )
    for prompt, teacher_prompt, completion in rows:
        q = log_probs(student, prompt + completion, len(prompt))
        with torch.no_grad():
            p = log_probs(teacher, teacher_prompt + completion, len(teacher_prompt))
            plain = log_probs(teacher, prompt + completion, len(prompt))
        at = (torch.arange(len(completion)), torch.tensor(completion))
        tq, tp = torch.log_softmax(q / temperature, -1), torch.log_softmax(p / temperature, -1)
        if beta == 1.0:
            divergence = kl(tq, (skew * tq.exp() + (1 - skew) * tp.exp()).log())
        elif beta == 0.0:
            divergence = kl(tp, (skew * tp.exp() + (1 - skew) * tq.exp()).log())
        else:
            mixed = (beta * tp.exp() + (1 - beta) * tq.exp()).log()
            divergence = beta * kl(tp, mixed) + (1 - beta) * kl(tq, mixed)
        cross_entropy = -q[at].sum()
        total["loss"] = total["loss"] + alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence
        total["ce"] += cross_entropy.item()
        total["kd"] += divergence.item()
        total["kl"] += kl(tq, tp).item()
        total["student_entropy"] -= (q.exp() * q).sum().item()
        total["teacher_entropy"] -= (p.exp() * p).sum().item()
        total["agree"] += (q.argmax(-1) == p.argmax(-1)).sum().item()
        total["right"] += (q.argmax(-1) == at[1]).sum().item()
        total["gain"] += (p[at].sum() - plain[at].sum()).item()
    return total


def sgd_step(model, loss, learning_rate, max_grad_norm=1.0):
    """One step in place; returns the gradient's norm before clipping."""
    model.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad
    return float(norm)
