"""What is measured of a student of the small world, on problems that no training set holds."""

import random
from pathlib import Path

import torch
from models import teacher as load_teacher
from transformers import GenerationConfig
from world import WRITERS, Problem, make_problem, make_tokenizer, said_result

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
    return TOKENIZER([f"{line}{question} answer :" for question in questions]).input_ids


def answers(model, prompts: list[list[int]], seed: int | None, batch_size: int = 250) -> list[list[int]]:
    """Token ids, end of text included; greedy where `seed` is None."""
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=seed is not None,
        top_k=0,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    with own_random_state(seed or 0, torch.device("cpu")):
        return generate_completions(model, prompts, config, batch_size)


def share_right(found: list[list[int]], of: list[Problem]) -> float:
    texts = TOKENIZER.batch_decode(found, skip_special_tokens=True)
    return sum(said_result(text) == problem.result for text, problem in zip(texts, of, strict=True)) / len(of)


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


class Measures:
    """The measures of one split, with the teacher's own part of them done once."""

    def __init__(self, folder: Path, split: str, num_greedy: int = 1000, num_sampled: int = 250):
        self.teacher = load_teacher(folder)
        self.problems = problems(split, num_greedy)
        self.prompts = prompt_ids([problem.question for problem in self.problems])
        self.sampled = self.prompts[:num_sampled]
        self.teacher_samples = answers(self.teacher, self.sampled, seed=1)
        self.teacher_on_own = log_probs(self.teacher, self.sampled, self.teacher_samples)

    def of_teacher(self) -> dict[str, dict[str, float]]:
        """Accuracies of the teacher behind no line, and behind the first line of each writer."""
        found = {}
        for writer, line in {"no line": "", **{name: lines[0] + " " for name, lines in WRITERS.items()}}.items():
            prompts = prompt_ids([problem.question for problem in self.problems], line)
            number = len(self.sampled)
            found[f"{writer}: {line}" if line else writer] = {
                "accuracy": share_right(answers(self.teacher, prompts, None), self.problems),
                "sampled_accuracy": share_right(answers(self.teacher, prompts[:number], 2), self.problems[:number]),
            }
        return found

    def of(self, student, soft_prompt=None) -> dict[str, float]:
        """Accuracies (shares), KLs and entropies (nats a token) of a student, and of the prompted teacher where there
        is one."""
        was_training = student.training
        student.eval()
        number = len(self.sampled)
        greedy = answers(student, self.prompts, None)
        samples, others = (answers(student, self.sampled, seed) for seed in (2, 3))
        q = log_probs(student, self.sampled, samples)
        p = log_probs(self.teacher, self.sampled, samples)
        texts = TOKENIZER.batch_decode(samples + others, skip_special_tokens=True)
        values = {
            "accuracy": share_right(greedy, self.problems),
            "sampled_accuracy": share_right(samples, self.problems[:number]),
            "reverse_kl": kl_divergence(q, p).mean().item(),
            "forward_kl": kl_divergence(self.teacher_on_own, log_probs(student, self.sampled, self.teacher_samples))
            .mean()
            .item(),
            "student_entropy": entropy(q).mean().item(),
            "mean_length": sum(map(len, samples)) / number,
            "brief_share": sum(len(ids) < 6 for ids in samples) / number,
            "two_samples_differ": sum(a != b for a, b in zip(texts[:number], texts[number:], strict=True)) / number,
        }
        if soft_prompt is not None:
            prompted = log_probs(self.teacher, self.sampled, samples, soft_prompt)
            values |= {
                "reverse_kl_prompted": kl_divergence(q, prompted).mean().item(),
                "prompted_student": kl_divergence(prompted, q).mean().item(),
                "prompted_plain": kl_divergence(prompted, p).mean().item(),
                "prompted_entropy": entropy(prompted).mean().item(),
                "prompted_forward_kl": kl_divergence(
                    self.teacher_on_own, log_probs(self.teacher, self.sampled, self.teacher_samples, soft_prompt)
                )
                .mean()
                .item(),
            }
        student.train(was_training)
        return values
