"""`trl-promptkd doctor`."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from ..doctor import diagnose, passed, print_table
from ..models.soft_prompt import PromptEncoderConfig
from ..models.tokenizer import load_teacher_tokenizer
from .common import add_data_arguments, json_dict, load_model, load_rows, priming_of, without_nan


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
    "teacher_gradient_checkpointing",
    "lora",
    "rows",
)


def add_doctor(tools: Any) -> None:
    doctor = tools.add_parser(
        "doctor", help="look at models and rows for what goes wrong silently; exits with 1 where a check fails"
    )
    doctor.add_argument("--model", required=True, help="the student: Hub id or folder")
    doctor.add_argument("--teacher", help="Hub id or folder; without it the student teaches itself")
    doctor.add_argument("--dataset", required=True, help="Hub id, or a .json, .jsonl, .csv or .parquet file")
    add_data_arguments(doctor)
    doctor.add_argument("--rows", type=int, default=16, help="how many rows to look at")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    run = doctor.add_argument_group("settings of the run, under the names of the trainers' configurations")
    run.add_argument("--max_length", type=int, default=1024)
    run.add_argument("--max_new_tokens", type=int, default=128)
    run.add_argument("--overlong", default="error", choices=["drop", "error"])
    run.add_argument("--per_device_train_batch_size", type=int, default=8)
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    run.add_argument("--teacher_gradient_checkpointing", action="store_true")
    run.add_argument("--num_virtual_tokens", type=int, default=7)
    run.add_argument("--lmbda", type=float, default=1.0, help="PromptKD: below 1 the data's answers are needed")
    run.add_argument("--response_source", default="dataset", choices=["dataset", "teacher", "student"])
    run.add_argument("--lora", action="store_true", help="an adapter is to be trained, not all weights")
    for role in ("model", "teacher"):
        run.add_argument(f"--{role}_init_kwargs", type=json_dict, default={}, help="JSON for from_pretrained")
    run.add_argument("--trust_remote_code", action="store_true")
    doctor.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # standard output is for the findings alone
        priming = priming_of(args)
        prompt_encoder_config = PromptEncoderConfig(num_virtual_tokens=args.num_virtual_tokens)
        dataset = load_rows(args)
        tokenizer = load_teacher_tokenizer(args.model, args.model_init_kwargs, args.trust_remote_code)
        if tokenizer is None:
            raise ValueError(f"`--model` is {args.model!r}, beside which there is no tokenizer. Save one there.")
        student = load_model(args.model, {"dtype": "float32", **args.model_init_kwargs}, args.trust_remote_code)
        teacher, teacher_tokenizer = None, None
        if args.teacher is not None:
            teacher = load_model(args.teacher, args.teacher_init_kwargs, args.trust_remote_code)
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
        checks = [{**asdict(finding), "values": without_nan(finding.values)} for finding in findings]
        print(json.dumps({**about, "passed": passed(findings), "checks": checks}, indent=1))
    else:
        print_table(findings, about)
    return 0 if passed(findings) else 1
