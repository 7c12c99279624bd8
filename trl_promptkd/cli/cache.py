"""`trl-promptkd cache build | merge | push | verify | info`."""

import argparse
import json
from typing import Any

from accelerate import PartialState

from ..data.priming import PRIMING_TEMPLATES
from ..models.teacher import load_teacher
from ..teacher_cache import TeacherCache, build_teacher_cache, merge_teacher_caches, verify_teacher_cache
from ..teacher_cache.codec import PRESETS
from .common import ROW_FLAGS, add_flags, json_dict, load_rows, needed_tokenizer, priming_of
from .names import check_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True)

    told = "run a teacher once and keep its distributions. Resumes, also under `accelerate launch -m trl_promptkd.cli`"
    build = commands.add_parser("build", help=told)
    add = build.add_argument
    add_flags(build, "teacher", "dataset", "output_dir", required=True)
    add_flags(build, *ROW_FLAGS)
    add("--priming", choices=sorted(PRIMING_TEMPLATES), help="what the teacher sees besides the prompt")
    add("--priming_file", help="a file with a priming text of your own (Jinja)")
    add("--priming_placement", default="prefix", choices=["prefix", "suffix", "system"])
    add("--preset", default="standard", choices=sorted(PRESETS), help="how much is kept")
    add("--response_source", default="dataset", choices=["dataset", "teacher"], help="source of the answers")
    add("--max_length", type=int, help="longest row in tokens as the student sees it")
    add("--teacher_max_length", type=int, help="longest row in tokens as the teacher sees it")
    add("--overlong", default="drop", choices=["drop", "error"], help="what to do with longer rows")
    add("--batch_size", type=int, default=8, help="rows per batch on one device")
    add("--max_new_tokens", type=int, default=256, help="longest answer that the teacher generates")
    add("--temperature", type=float, default=1.0, help="temperature of the teacher's samples")
    add("--seed", type=int, default=42, help="seed of the teacher's samples")
    add("--backend", default="transformers", choices=["transformers", "vllm", "server"], help="what runs the teacher")
    add("--teacher_server", help="URL of a vLLM server in pooling mode, such as http://host:8000")
    add("--vllm_kwargs", type=json_dict, help="JSON for vllm.LLM, such as '{\"tensor_parallel_size\": 4}'")
    add("--part", help="build one of several parts, such as 2/3, on hosts that share nothing")
    add("--basis", help="basis.safetensors of another cache of this teacher. Parts after the first need the first's")

    merge = commands.add_parser("merge", help="join the parts of a cache")
    merge.add_argument("output_dir", help="folder of the whole cache")
    merge.add_argument("parts", nargs="+", metavar="part", help="folder or Hub id")
    merge.set_defaults(run=merge_caches)

    push = commands.add_parser("push", help="upload a cache, or a part of one, as a data set on the Hub")
    push.add_argument("cache", help="folder")
    push.add_argument("repo_id", help="name of the data set, such as you/gsm8k-cache")
    push.add_argument("--private", action="store_true", help="make the data set private, if it is new")
    push.set_defaults(run=push_cache)

    verify = commands.add_parser("verify", help="compare checksums, and run the live teacher on some rows")
    verify.add_argument("cache", help="folder or Hub id")
    verify.add_argument("--teacher", help="Hub id or folder. By default the manifest's name")
    verify.add_argument("--rows", type=int, default=16, help="rows to run the teacher on")
    told = "exit with 1 if the mean KL in nats per token is larger. By default about twice the receipt's mean"
    verify.add_argument("--max_kl", type=float, help=told)

    info = commands.add_parser("info", help="print manifest and receipt")
    info.add_argument("cache", help="folder or Hub id")
    info.set_defaults(run=cache_info)
    for command, run in ((build, build_cache), (verify, verify_cache)):
        add_flags(command, "teacher_init_kwargs", "trust_remote_code")
        command.set_defaults(run=run)


def build_cache(args: argparse.Namespace) -> int:
    priming = priming_of(args)
    columns = (args.prompt_column, args.completion_column, args.conversational)
    dataset = load_rows(args.dataset, args.dataset_config, args.dataset_split, *columns)
    tokenizer = needed_tokenizer("--teacher", args.teacher, args.teacher_init_kwargs, args.trust_remote_code)
    same = "preset response_source max_length teacher_max_length overlong batch_size max_new_tokens temperature seed "
    same += "backend teacher_server vllm_kwargs part basis"
    cache = build_teacher_cache(
        args.teacher,
        dataset,
        args.output_dir,
        tokenizer,
        priming=priming,
        teacher_model_init_kwargs=args.teacher_init_kwargs,
        trust_remote_code=args.trust_remote_code,
        **{name: getattr(args, name) for name in same.split()},
    )
    if PartialState().is_main_process:
        show(cache)
    return 0


def show(cache: TeacherCache) -> None:
    """Print manifest and receipt in a readable form."""
    manifest = cache.manifest
    teacher, priming = manifest.teacher, manifest.priming
    lines: dict[str, Any] = {
        "folder": cache.path,
        "teacher": f"{teacher['name'] or 'no name'} ({teacher['dtype']}, quantization {teacher['quantization']})",
        "run by": teacher.get("backend", "transformers"),
        "priming": "none" if priming is None else f"{priming['placement']}: {priming['text']!r}",
        "answers": "the data's" if manifest.response_source == "dataset" else "the teacher's",
        "preset": manifest.preset,
        **({} if manifest.part is None else {"part": manifest.part}),
        "shards": len(manifest.shards),
        **manifest.receipt,
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


def merge_caches(args: argparse.Namespace) -> int:
    show(merge_teacher_caches(args.parts, args.output_dir))
    return 0


def push_cache(args: argparse.Namespace) -> int:
    TeacherCache(args.cache).push_to_hub(args.repo_id, private=args.private or None)
    print(f"{args.cache} is now the data set {args.repo_id} on the Hub.")
    return 0


def cache_info(args: argparse.Namespace) -> int:
    show(TeacherCache(args.cache, verify_checksums=False))
    return 0


def verify_cache(args: argparse.Namespace) -> int:
    cache = TeacherCache(args.cache)
    print(f"Checksums of {len(cache.manifest.shards) + len(cache.manifest.files)} files are right.")
    name = args.teacher or cache.manifest.teacher["name"]
    if not name:
        raise ValueError("The manifest does not name the teacher. Pass `--teacher`.")
    check_name("--teacher", name, token=args.teacher_init_kwargs.get("token"))
    made = cache.manifest.teacher
    kwargs = {"dtype": made["dtype"]} | ({"revision": made["revision"]} if made["revision"] else {})
    if made["quantization"] != "none" and "quantization_config" not in args.teacher_init_kwargs:
        print(
            f"The cache's teacher was quantized ({made['quantization']}); pass the same `--teacher_init_kwargs` to "
            "replay it."
        )
    teacher = load_teacher(name, kwargs | args.teacher_init_kwargs, args.trust_remote_code)
    result = verify_teacher_cache(cache, teacher, args.rows)
    print(json.dumps(result, indent=1))
    if not result["same_weights"]:
        print(f"{name} is not the teacher that the cache was made with: its weights differ.")
        return 1
    limit = args.max_kl if args.max_kl is not None else 2 * cache.manifest.receipt.get("kl_mean", 0.0) + 1e-3
    if result.get("kl_mean", 0.0) > limit:
        print(f"The mean KL of {result['kl_mean']:.4f} nats per token is above {limit:.4f}.")
        return 1
    return 0
