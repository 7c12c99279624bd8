"""The command `trl-promptkd`."""

import argparse
import json
import math
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

import torch
from accelerate import PartialState
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from transformers import AutoTokenizer

from .data import name_columns
from .doctor import diagnose, passed, print_table
from .priming import PRIMING_TEMPLATES, PrimingTemplate
from .prompt_encoder import PromptEncoderConfig
from .teacher import load_teacher, load_teacher_tokenizer
from .teacher_cache import TeacherCache, build_teacher_cache, verify_teacher_cache
from .teacher_cache.codec import PRESETS


__all__ = ["main"]

_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Flags of `doctor` that are arguments of `diagnose`
_SETTINGS = (
    "lmbda",
    "response_source",
    "max_length",
    "max_new_tokens",
    "overlong",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "lora",
    "rows",
)


def _json_dict(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the JSON of a dict, such as {json.dumps({'dtype': 'float32'})!r}"
        )
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-promptkd", description="Tools of trl_promptkd.")
    tools = parser.add_subparsers(dest="command", required=True)
    _add_doctor(tools)
    cache = tools.add_parser("cache", help="the offline teacher")
    commands = cache.add_subparsers(dest="action", required=True)

    build = commands.add_parser(
        "build",
        help="ask a teacher once and keep what it says; goes on where it was, also under `accelerate launch -m trl_promptkd.cli`",
    )
    build.add_argument("--teacher", required=True, help="Hub id or folder")
    build.add_argument("--output_dir", required=True, help="the cache's folder")
    build.add_argument("--dataset_name", default="json", help="Hub id, or json, csv, parquet with --data_files")
    build.add_argument("--data_files", help="local files, or a pattern")
    _add_data_arguments(build)
    build.add_argument("--preset", default="standard", choices=sorted(PRESETS), help="how much is kept")
    build.add_argument("--response_source", default="dataset", choices=["dataset", "teacher"], help="whose answers")
    build.add_argument("--max_length", type=int, help="longest row in tokens as the student sees it")
    build.add_argument("--teacher_max_length", type=int, help="longest row in tokens as the teacher sees it")
    build.add_argument("--overlong", default="drop", choices=["drop", "error"], help="what to do with longer rows")
    build.add_argument("--batch_size", type=int, default=8, help="rows at once on one device")
    build.add_argument("--max_new_tokens", type=int, default=256, help="longest answer that the teacher writes")
    build.add_argument("--temperature", type=float, default=1.0, help="of its samples")
    build.add_argument("--seed", type=int, default=42, help="of its samples")

    verify = commands.add_parser("verify", help="compare checksums, and replay rows on the live teacher")
    verify.add_argument("cache", help="folder or Hub id")
    verify.add_argument("--teacher", help="Hub id or folder; the manifest's name by default")
    verify.add_argument("--rows", type=int, default=16, help="rows to replay")
    verify.add_argument(
        "--max_kl", type=float, help="exit with 1 above so many nats a token; by default twice the receipt's mean"
    )

    info = commands.add_parser("info", help="print manifest and receipt")
    info.add_argument("cache", help="folder or Hub id")
    for command in (build, verify):
        command.add_argument("--teacher_init_kwargs", type=_json_dict, default={}, help="JSON for from_pretrained")
        command.add_argument("--trust_remote_code", action="store_true")
    for command, run in ((build, build_cache), (verify, verify_cache), (info, cache_info)):
        command.set_defaults(run=run)
    return parser


def _add_data_arguments(command: argparse.ArgumentParser) -> None:
    """What a data set's rows are, and what the teacher sees besides them."""
    command.add_argument("--dataset_config", help="its configuration")
    command.add_argument("--dataset_split", default="train", help="its split, or a part of it: train[:1000]")
    command.add_argument("--prompt_column", help="column to take as `prompt`")
    command.add_argument("--completion_column", help="column to take as `completion`")
    command.add_argument("--conversational", action="store_true", help="make conversations of texts (chat template)")
    command.add_argument(
        "--priming", choices=sorted(PRIMING_TEMPLATES), help="what the teacher sees besides the prompt"
    )
    command.add_argument("--priming_file", help="a file with a priming text of your own (Jinja)")
    command.add_argument("--priming_placement", default="prefix", choices=["prefix", "suffix", "system"])


def _add_doctor(tools: Any) -> None:
    doctor = tools.add_parser(
        "doctor", help="look at models and rows for what goes wrong silently; exits with 1 where a check fails"
    )
    doctor.add_argument("--model", required=True, help="the student: Hub id or folder")
    doctor.add_argument("--teacher", help="Hub id or folder; without it the student teaches itself")
    doctor.add_argument("--dataset", required=True, help="Hub id, or a .json, .jsonl, .csv or .parquet file")
    _add_data_arguments(doctor)
    doctor.add_argument("--rows", type=int, default=16, help="how many rows to look at")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    run = doctor.add_argument_group("settings of the run, under the names of the trainers' configurations")
    run.add_argument("--max_length", type=int, default=1024)
    run.add_argument("--max_new_tokens", type=int, default=128)
    run.add_argument("--overlong", default="error", choices=["drop", "error"])
    run.add_argument("--per_device_train_batch_size", type=int, default=8)
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    run.add_argument("--num_virtual_tokens", type=int, default=7)
    run.add_argument("--lmbda", type=float, default=1.0, help="PromptKD: below 1 the data's answers are needed")
    run.add_argument("--response_source", default="dataset", choices=["dataset", "teacher", "student"])
    run.add_argument("--lora", action="store_true", help="an adapter is to be trained, not all weights")
    for role in ("model", "teacher"):
        run.add_argument(f"--{role}_init_kwargs", type=_json_dict, default={}, help="JSON for from_pretrained")
    run.add_argument("--trust_remote_code", action="store_true")
    doctor.set_defaults(run=run_doctor)


def _priming(args: argparse.Namespace) -> str | PrimingTemplate | None:
    if args.priming is not None and args.priming_file is not None:
        raise ValueError("`--priming` and `--priming_file` are both given; choose one.")
    if args.priming_file is not None:
        return PrimingTemplate.from_file(args.priming_file, args.priming_placement)
    return args.priming


def run_doctor(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # standard output is for the findings alone
        priming = _priming(args)
        prompt_encoder_config = PromptEncoderConfig(num_virtual_tokens=args.num_virtual_tokens)
        dataset = _load_rows(args)
        tokenizer = load_teacher_tokenizer(args.model, args.model_init_kwargs, args.trust_remote_code)
        if tokenizer is None:
            raise ValueError(f"`--model` is {args.model!r}, beside which there is no tokenizer. Save one there.")
        student = _load_model(args.model, {"dtype": "float32", **args.model_init_kwargs}, args.trust_remote_code)
        teacher, teacher_tokenizer = None, None
        if args.teacher is not None:
            teacher = _load_model(args.teacher, args.teacher_init_kwargs, args.trust_remote_code)
            teacher_tokenizer = load_teacher_tokenizer(args.teacher, args.teacher_init_kwargs, args.trust_remote_code)
        settings = {name: getattr(args, name) for name in _SETTINGS}
        findings = diagnose(
            student,
            teacher,
            dataset,
            tokenizer,
            teacher_tokenizer,
            prompt_encoder_config=prompt_encoder_config,
            priming=priming,
            **settings,
        )
    about = {"model": args.model, "teacher": args.teacher, "dataset": args.dataset}
    if args.json:
        checks = [{**asdict(finding), "values": _without_nan(finding.values)} for finding in findings]
        print(json.dumps({**about, "passed": passed(findings), "checks": checks}, indent=1))
    else:
        print_table(findings, about)
    return 0 if passed(findings) else 1


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """What is not finite as null: JSON has no word for it."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _load_rows(args: argparse.Namespace) -> Any:
    """The data set of `--dataset`: a file by its ending, or a Hub id."""
    kind = _FILES.get(os.path.splitext(args.dataset)[1])
    if kind is not None and not os.path.isfile(args.dataset):
        raise ValueError(f"`--dataset` is {args.dataset!r}, and there is no such file.")
    files = None if kind is None else args.dataset
    try:
        dataset = load_dataset(
            kind or args.dataset, name=args.dataset_config, data_files=files, split=args.dataset_split
        )
    except DatasetsError as error:
        raise ValueError(f"`--dataset` is {args.dataset!r}, which cannot be read: {error}") from error
    return name_columns(dataset, args.prompt_column, args.completion_column, args.conversational)


def _load_model(name: str, init_kwargs: dict[str, Any], trust_remote_code: bool) -> Any:
    print(f"Loading {name}", file=sys.stderr)
    model = load_teacher(name, init_kwargs, trust_remote_code)
    quantized = getattr(model, "quantization_method", None) is not None  # is where it belongs already
    return model.to("cuda") if torch.cuda.is_available() and not quantized else model


def build_cache(args: argparse.Namespace) -> int:
    priming = _priming(args)
    dataset = load_dataset(
        args.dataset_name, name=args.dataset_config, data_files=args.data_files, split=args.dataset_split
    )
    dataset = name_columns(dataset, args.prompt_column, args.completion_column, args.conversational)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=args.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    cache = build_teacher_cache(
        args.teacher,
        dataset,
        args.output_dir,
        tokenizer,
        priming=priming,
        preset=args.preset,
        response_source=args.response_source,
        max_length=args.max_length,
        teacher_max_length=args.teacher_max_length,
        overlong=args.overlong,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        teacher_model_init_kwargs=args.teacher_init_kwargs,
        trust_remote_code=args.trust_remote_code,
        seed=args.seed,
    )
    if PartialState().is_main_process:
        show(cache)
    return 0


def show(cache: TeacherCache) -> None:
    """Manifest and receipt, as a reader would want them."""
    manifest = cache.manifest
    lines: dict[str, Any] = {
        "folder": cache.path,
        "teacher": f"{manifest.teacher['name'] or 'without a name'} ({manifest.teacher['dtype']}, quantization {manifest.teacher['quantization']})",
        "priming": "none"
        if manifest.priming is None
        else f"{manifest.priming['placement']}: {manifest.priming['text']!r}",
        "answers": "the data's" if manifest.response_source == "dataset" else "the teacher's",
        "preset": manifest.preset,
        "shards": len(manifest.shards),
        **manifest.receipt,
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


def cache_info(args: argparse.Namespace) -> int:
    show(TeacherCache(args.cache, verify_checksums=False))
    return 0


def verify_cache(args: argparse.Namespace) -> int:
    cache = TeacherCache(args.cache)
    print(f"Checksums of {len(cache.manifest.shards) + len(cache.manifest.files)} files are right.")
    name = args.teacher or cache.manifest.teacher["name"]
    if not name:
        raise ValueError("The manifest does not name the teacher. Pass `--teacher`.")
    made = cache.manifest.teacher
    kwargs = {"dtype": made["dtype"]} | ({"revision": made["revision"]} if made["revision"] else {})
    if made["quantization"] != "none" and "quantization_config" not in args.teacher_init_kwargs:
        print(
            f"The cache's teacher was quantized ({made['quantization']}); pass the same `--teacher_init_kwargs` to replay it."
        )
    teacher = load_teacher(name, kwargs | args.teacher_init_kwargs, args.trust_remote_code)
    result = verify_teacher_cache(cache, teacher, args.rows)
    print(json.dumps(result, indent=1))
    if not result["same_weights"]:
        print(f"{name} is not the teacher that the cache was made with: its weights differ.")
        return 1
    limit = args.max_kl if args.max_kl is not None else 2 * cache.manifest.receipt.get("kl_mean", 0.0) + 1e-3
    if result.get("kl_mean", 0.0) > limit:
        print(f"The mean KL of {result['kl_mean']:.4f} nats a token is above {limit:.4f}.")
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, DatasetsError) as error:  # they say what to do
        print(f"trl-promptkd: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
