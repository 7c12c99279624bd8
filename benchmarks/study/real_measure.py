"""The real model's students, measured: ROUGE-L against gold answers and against the teacher's, and both KLs on neutral
samples.

    python benchmarks/study/real_measure.py --teacher models/teacher --folder study_real \\
        --sets dolly=valid.jsonl vicuna=valid.jsonl

Answers and measures are kept in `--folder`; what is there is not done again.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_promptkd.analysis.log_probs import log_probs_together
from trl_promptkd.analysis.saved_prompt import read_prompt
from trl_promptkd.divergences import entropy, kl_divergence
from trl_promptkd.evaluation import evaluate_model, evaluation_config, evaluation_rows
from trl_promptkd.files import whole_file
from trl_promptkd.generation.rollouts import generate_completions


STUDENTS = ["warm", "sft", "seqkd", "gkd", "promptkd", "promptkd_lr1e-3", "promptkd_lr1e-2"]
MAX_PROMPT, MAX_NEW_TOKENS = 128, 64


def read_set(path: str, number: int, tokenizer) -> list[dict]:
    """The first rows whose prompts are short enough."""
    rows = []
    for row in load_dataset("json", data_files=path, split="train"):
        text = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        if len(tokenizer.encode(text)) <= MAX_PROMPT - 40:
            rows.append({"instruction": row["instruction"], "input": row["input"], "output": row["output"]})
    return rows[:number]


def neutral_kls(student, teacher, soft_prompt, tokenizer, prompts, teacher_samples) -> dict[str, float]:
    """KL(q || p) on the student's samples and KL(p || q) on the teacher's, entropies, and what the prompt does; nats a
    token."""
    config = evaluation_config(student, tokenizer, MAX_NEW_TOKENS, greedy=False)
    samples = generate_completions(student, prompts, config, 16, len(tokenizer), row_seeds=range(len(prompts)))
    asked = [(student, None), (teacher, None)] + ([(teacher, soft_prompt)] if soft_prompt is not None else [])
    sums: dict[str, float] = {}
    tokens = 0

    def add(name: str, values: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + values.sum().item()

    for start in range(0, len(prompts), 8):
        part = slice(start, start + 8)
        for q, p, *prompted in log_probs_together(asked, prompts[part], samples[part], tokenizer.pad_token_id):
            tokens += len(q)
            add("reverse_kl", kl_divergence(q, p))
            add("student_entropy", entropy(q))
            if prompted:
                add("reverse_kl_prompted", kl_divergence(q, prompted[0]))
                add("prompted_plain", kl_divergence(prompted[0], p))
                add("prompted_entropy", entropy(prompted[0]))
    found = {name: value / tokens for name, value in sums.items()}
    total, tokens = 0.0, 0
    for start in range(0, len(prompts), 8):
        part = slice(start, start + 8)
        for q, p in log_probs_together(asked[:2], prompts[part], teacher_samples[part], tokenizer.pad_token_id):
            total, tokens = total + kl_divergence(p, q).sum().item(), tokens + len(q)
    return {**found, "forward_kl": total / tokens, "mean_length": sum(map(len, samples)) / len(samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--folder", type=Path, default=Path("study_real"), help="what real_model.py wrote")
    parser.add_argument(
        "--sets", nargs="+", required=True, help="name=file, JSON lines with instruction, input, output"
    )
    parser.add_argument("--rows", type=int, default=40, help="of each set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20])
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
    gold = {}
    for entry in args.sets:
        name, path = entry.split("=", 1)
        gold[name] = read_set(path, args.rows, tokenizer)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 16}

    def scores(model, rows: dict[str, list[dict]], seeds, folder: Path) -> dict[str, dict]:
        sets = {name: Dataset.from_list(some) for name, some in rows.items()}
        found = evaluate_model(model, tokenizer, sets, seeds=seeds, output_dir=str(folder), **settings)
        return {name: {"mean": one["mean"], "std": one["std"]} for name, one in found["sets"].items()}

    first = next(iter(gold))
    prompts = evaluation_rows(Dataset.from_list(gold[first]), first, "instruct", tokenizer, "chat").prompt_ids
    config = evaluation_config(teacher, tokenizer, MAX_NEW_TOKENS, greedy=False)
    teacher_samples = generate_completions(teacher, prompts, config, 16, len(tokenizer), row_seeds=range(len(prompts)))
    greedy = evaluation_config(teacher, tokenizer, MAX_NEW_TOKENS, greedy=True)
    by_teacher = {}
    for name, rows in gold.items():
        ids = evaluation_rows(Dataset.from_list(rows), name, "instruct", tokenizer, "chat").prompt_ids
        texts = tokenizer.batch_decode(
            generate_completions(teacher, ids, greedy, 16, len(tokenizer)), skip_special_tokens=True
        )
        by_teacher[name] = [{**row, "output": text} for row, text in zip(rows, texts, strict=True)]
    kept = args.folder / "measures.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    if "teacher" not in results:
        results["teacher"] = {"gold": scores(teacher, gold, args.seeds, args.folder / "answers" / "teacher")}
    for name in STUDENTS:
        folder = args.folder / name
        if name in results or not folder.exists():
            continue
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        prompt = folder / "teacher_prompt"
        soft_prompt = read_prompt(str(prompt)).embeddings if prompt.exists() else None
        answers = args.folder / "answers" / name
        run = json.loads((folder / "run.json").read_text())
        results[name] = {
            "gold": scores(student, gold, args.seeds, answers),
            "teacher": scores(student, by_teacher, args.seeds, answers),
            **neutral_kls(student, teacher, soft_prompt, tokenizer, prompts, teacher_samples),
            "cpu_seconds": run["cpu_seconds"],
            "log": run["log"],
        }
        print(name, {key: value for key, value in results[name].items() if key != "log"}, flush=True)
        with whole_file(str(kept)) as path:
            Path(path).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
