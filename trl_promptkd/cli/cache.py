"""`trl-promptkd cache build | verify | info`."""

import argparse
import json
from typing import Any

from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoTokenizer

from ..data import name_columns
from ..models.teacher import load_teacher
from ..teacher_cache import TeacherCache, build_teacher_cache, verify_teacher_cache
from ..teacher_cache.codec import PRESETS
from .common import add_data_arguments, json_dict, priming_of


def add_cache(tools: Any) -> None:
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
    add_data_arguments(build)
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
        command.add_argument("--teacher_init_kwargs", type=json_dict, default={}, help="JSON for from_pretrained")
        command.add_argument("--trust_remote_code", action="store_true")
    for command, run in ((build, build_cache), (verify, verify_cache), (info, cache_info)):
        command.set_defaults(run=run)


def build_cache(args: argparse.Namespace) -> int:
    priming = priming_of(args)
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
