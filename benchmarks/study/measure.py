"""What is measured of a student of the small world, on problems that no training set holds."""

import random
from pathlib import Path

import torch
from models import teacher as load_teacher
from torch.nn.functional import pad
from transformers import GenerationConfig
from world import (
    ALL_LINES,
    Problem,
    gold_answer,
    make_problem,
    make_tokenizer,
    said_result,
    writer_of,
)

from trl_promptkd.data import pad_rows
from trl_promptkd.divergences import entropy, kl_divergence
from trl_promptkd.generation.rollouts import generate_completions, own_random_state
from trl_promptkd.models.forward import completion_states


MAX_NEW_TOKENS = 48
TOKENIZER = make_tokenizer()


def problems(split: str, number: int) -> list[Problem]:
    rng = random.Random(split)
    return [make_problem(rng) for _ in range(number)]


def prompt_ids(questions: list[str], line: str = "") -> list[list[int]]:
    """Prompts of `line` and a question. A line ends with a space."""
    return TOKENIZER([f"{line}{question} answer :" for question in questions]).input_ids


def answer_ids(texts: list[str]) -> list[list[int]]:
    """With the end of text."""
    return [[*ids, TOKENIZER.eos_token_id] for ids in TOKENIZER(texts).input_ids]


def answers(model, prompts: list[list[int]], seed: int | None, batch_size: int = 250) -> list[list[int]]:
    """Token ids, end of text included; greedy if `seed` is None."""
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=seed is not None,
        top_k=0,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    with own_random_state(seed or 0, torch.device("cpu")):
        return generate_completions(model, prompts, config, batch_size)


def texts_of(found: list[list[int]]) -> list[str]:
    return TOKENIZER.batch_decode(found, skip_special_tokens=True)


def share_right(found: list[list[int]], of: list[Problem]) -> float:
    texts = texts_of(found)
    return sum(said_result(text) == problem.result for text, problem in zip(texts, of, strict=True)) / len(of)


def shares_of_writers(found: list[list[int]], of: list[Problem]) -> dict[str, float]:
    """Which share of the answers each writer may have written (see `writer_of`)."""
    writers = [writer_of(text, problem) for text, problem in zip(texts_of(found), of, strict=True)]
    return {f"{writer}_share": writers.count(writer) / len(of) for writer in ("careful", "brief", "pupil")}


@torch.no_grad()
def log_probs(model, prompts, completions, soft_prompt=None, batch_size: int = 125) -> torch.Tensor:
    """At all tokens of all completions: `(num_tokens, vocab)`."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        batch = pad_rows(prompts[rows], completions[rows], TOKENIZER.pad_token_id)
        states = completion_states(
            model, batch["input_ids"], batch["attention_mask"], batch["labels"], soft_prompt, len(TOKENIZER)
        )
        parts.append(states.logits().log_softmax(dim=-1))
    return torch.cat(parts)


def nll(log_probs_: torch.Tensor, completions: list[list[int]]) -> torch.Tensor:
    """Of the completions' tokens: `(num_tokens,)`."""
    ids = torch.tensor([token for row in completions for token in row])
    return -log_probs_.gather(1, ids[:, None])[:, 0]


class Measures:
    """The measures of one split, with the teacher's own part of them done once."""

    def __init__(self, folder: Path, split: str, num_greedy: int = 1000, num_sampled: int = 500):
        self.teacher = load_teacher(folder)
        self.problems = problems(split, num_greedy)
        self.questions = [problem.question for problem in self.problems]
        self.prompts = prompt_ids(self.questions)
        self.of_sampled = self.problems[:num_sampled]
        self.sampled = self.prompts[:num_sampled]
        rng = random.Random(f"{split} gold")
        self.gold = answer_ids([gold_answer(problem, rng) for problem in self.of_sampled])
        self.teacher_samples = answers(self.teacher, self.sampled, seed=1)
        self.teacher_on_own = log_probs(self.teacher, self.sampled, self.teacher_samples)

    def _means(self, name: str, values: torch.Tensor) -> dict[str, float]:
        """A mean per token, and one per answer."""
        return {name: values.mean().item(), f"{name}_per_answer": values.sum().item() / len(self.sampled)}

    def of_answers(self, found: list[list[int]]) -> dict[str, float]:
        return {
            "sampled_accuracy": share_right(found, self.of_sampled),
            **shares_of_writers(found, self.of_sampled),
            "mean_length": sum(map(len, found)) / len(found),
            "ended_share": sum(ids[-1] == TOKENIZER.eos_token_id for ids in found) / len(found),
        }

    def of_teacher(self, line: str = "", soft_prompt: torch.Tensor | None = None) -> dict[str, float]:
        """What the teacher samples after a line or a soft prompt, and how far it is from the plain teacher."""
        prompts = prompt_ids(self.questions[: len(self.sampled)], line)
        if soft_prompt is None:
            samples = answers(self.teacher, prompts, seed=4)
        else:
            samples = prompted_answers(self.teacher, soft_prompt, prompts, seed=4)
        values = self.of_answers(samples)
        on_own = log_probs(self.teacher, prompts, self.teacher_samples, soft_prompt)
        on_gold = log_probs(self.teacher, prompts, self.gold, soft_prompt)
        return {
            **values,
            **self._means("gold_nll", nll(on_gold, self.gold)),
            **self._means("plain_prompted", kl_divergence(self.teacher_on_own, on_own)),
        }

    def of_lines(self) -> dict[str, dict[str, float]]:
        """[`of_teacher`] without a line, and with every line of the study."""
        return {line: self.of_teacher(line and f"{line} ") for line in ALL_LINES}

    def of(self, student, line: str = "", soft_prompt: torch.Tensor | None = None) -> dict[str, float]:
        """Measures of a student, and of the teacher with the line or prompt that the student was trained with.

        Accuracies and shares are shares of 1. KLs, entropies and NLLs are in nats per token, or per answer if the
        name says so.
        """
        was_training = student.training
        student.eval()
        samples = answers(student, self.sampled, 2)
        q = log_probs(student, self.sampled, samples)
        p = log_probs(self.teacher, self.sampled, samples)
        on_teachers = log_probs(student, self.sampled, self.teacher_samples)
        values = {
            "accuracy": share_right(answers(student, self.prompts, None), self.problems),
            **self.of_answers(samples),
            **self._means("reverse_kl", kl_divergence(q, p)),
            **self._means("forward_kl", kl_divergence(self.teacher_on_own, on_teachers)),
            **self._means("gold_nll", nll(log_probs(student, self.sampled, self.gold), self.gold)),
            "student_entropy": entropy(q).mean().item(),
        }
        if line or soft_prompt is not None:
            prompts = prompt_ids(self.questions[: len(self.sampled)], line)
            prompted = log_probs(self.teacher, prompts, samples, soft_prompt)
            of_teacher = self.of_teacher(line, soft_prompt)
            values |= {
                **self._means("student_prompted", kl_divergence(q, prompted)),
                **self._means("prompted_plain", kl_divergence(prompted, p)),
                **{f"teacher_{name}": value for name, value in of_teacher.items()},
            }
        student.train(was_training)
        return values


@torch.no_grad()
def prompted_answers(
    teacher, soft_prompt, prompts: list[list[int]], seed: int, batch_size: int = 250
) -> list[list[int]]:
    """Samples of the teacher with a soft prompt, which stands directly before each row's first token."""
    embed = teacher.get_input_embeddings()
    found = []
    with own_random_state(seed, torch.device("cpu")):
        for start in range(0, len(prompts), batch_size):
            rows = [torch.cat([soft_prompt, embed(torch.tensor(ids))]) for ids in prompts[start : start + batch_size]]
            width = max(map(len, rows))
            lengths = torch.tensor([len(row) for row in rows])
            inputs = torch.stack([pad(row, (0, 0, width - len(row), 0)) for row in rows])
            mask = (torch.arange(width) >= width - lengths[:, None]).long()
            ids = teacher.generate(
                inputs_embeds=inputs, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, top_k=0
            )
            found += [until_the_end(row) for row in ids.tolist()]
    return found


def until_the_end(ids: list[int]) -> list[int]:
    end = TOKENIZER.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids
