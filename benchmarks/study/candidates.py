"""Candidates that may beat the paper: a prompt anchored on answers, and a budget for how far it moves the teacher."""

import torch
from measure import TOKENIZER, answers, prompt_ids, texts_of
from models import training_problems, training_rows
from torch.nn.functional import cross_entropy
from world import said_result

from trl_promptkd import PromptKDTrainer
from trl_promptkd.data import masked_rows, pad_rows
from trl_promptkd.models.forward import completion_states
from trl_promptkd.models.teacher import run_teacher


__all__ = ["CandidateTrainer", "anchor_answers"]

TRIES = 4  # samples of the teacher for each question, if its own right answers are the anchor
ASCENT = 0.1  # how fast the regulariser's weight follows the budget


def anchor_answers(teacher, source: str, num_rows: int) -> dict[tuple[int, ...], list[int]]:
    """Prompt -> the answer that the soft prompt is to make likely.

    Args:
        source: `"gold"` for the data's answers, or `"right"` for the plain teacher's first sample with the right
            number. Questions without one are omitted.
    """
    rows = training_rows(num_rows)
    prompts = prompt_ids([question for question, _ in rows])
    keys = [tuple(prompt) for prompt in prompts]
    if source == "gold":
        found = [[*ids, TOKENIZER.eos_token_id] for ids in TOKENIZER([answer for _, answer in rows]).input_ids]
        return dict(zip(keys, found, strict=True))
    chosen: dict[tuple[int, ...], list[int]] = {}
    problems = training_problems(num_rows)
    for attempt in range(TRIES):
        missing = [row for row in range(num_rows) if keys[row] not in chosen]
        found = answers(teacher, [prompts[row] for row in missing], seed=100 + attempt)
        for row, ids, text in zip(missing, found, texts_of(found), strict=True):
            if said_result(text) == problems[row].result:
                chosen[keys[row]] = ids
    return chosen


class CandidateTrainer(PromptKDTrainer):
    """PromptKD whose soft prompt has more terms in its loss.

    Args:
        anchor: Prompt -> answer, see [`anchor_answers`].
        anchor_weight: `a` of `a * NLL(answer | x, P)`, a mean over the answers' tokens.
        budget: KL(pP || p) to keep to, in nats per answer. The regulariser's weight rises above it and falls below.
    """

    def __init__(self, *args, anchor=None, anchor_weight: float = 0.0, budget: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.anchor, self.anchor_weight, self.budget = anchor or {}, anchor_weight, budget

    def anchor_loss(self, teacher, prompts: list[list[int]]) -> torch.Tensor | None:
        """Mean NLL per token of the answers that are known."""
        known = [(prompt, self.anchor[tuple(prompt)]) for prompt in prompts if tuple(prompt) in self.anchor]
        if not known:
            return None
        batch = pad_rows([p for p, _ in known], [a for _, a in known], TOKENIZER.pad_token_id)
        rows = (batch["input_ids"], batch["attention_mask"], batch["labels"])
        states = completion_states(teacher, *rows, self.soft_prompt(), self.shared_vocab_size)
        targets = torch.tensor([token for _, answer in known for token in answer])
        return cross_entropy(states.logits().float(), targets)

    def _distill(self, student, inputs, num_tokens):
        if self.anchor_weight:
            prompts = masked_rows(inputs["prompts"], inputs["prompt_attention_mask"])
            with run_teacher(self.teacher_model, student) as teacher:
                loss = self.anchor_loss(teacher, prompts)
            if loss is not None:
                parameters = list(self.soft_prompt.parameters())
                for parameter, part in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = self.anchor_weight * part
        sums = self._train_means._sums
        before = sums.get("kl/prompted_plain", torch.zeros(()))
        result = super()._distill(student, inputs, num_tokens)
        if self.budget is not None:
            an_answer = float(sums["kl/prompted_plain"] - before) / len(inputs["labels"])
            step = ASCENT * (an_answer - self.budget) / self.budget
            self.args.regularization_coef = min(max(self.args.regularization_coef + step, 0.01), 10.0)
        return result

    def tune_prompt(self, steps: int, learning_rate: float, batch_size: int, seed: int) -> None:
        """Prompt tuning on the anchor's answers alone, before the student's training."""
        generator = torch.Generator().manual_seed(seed)
        prompts = list(self.anchor)
        optimizer = torch.optim.AdamW(self.soft_prompt.parameters(), lr=learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with self._run_teacher() as teacher:
            for _ in range(steps):
                chosen = torch.randint(len(prompts), (batch_size,), generator=generator)
                loss = self.anchor_loss(teacher, [list(prompts[i]) for i in chosen])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.soft_prompt.parameters(), 1.0)
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
