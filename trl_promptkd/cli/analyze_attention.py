"""`trl-promptkd analyze attention`."""

import argparse
from typing import Any

from ..analysis.attention import QUERIES, head_matrices, measure_attention, num_queries
from ..analysis.plot_style import check_matplotlib
from ..analysis.plots import plot_heads, plot_measures
from ..analysis.saved_prompt import check_fits, find_prompts
from ..models.tokenizer import shared_vocab_size
from . import common
from .common import add_flags, at_least_one, print_table
from .names import check_name


_ANSWERS_NEEDED = "The attention of answers is measured; for that of prompts too pass `--queries all`."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, nargs="+", help="the students: Hub ids or folders, also of adapters")
    add("--prompt", help="folder of the teacher's soft prompt, or of its run. Adds the prompted teacher")
    add("--queries", default="completion", choices=QUERIES, help="tokens whose attention is measured (%(default)s)")
    add("--heads", type=at_least_one, default=4, help="how many heads to draw, on the first row")
    add_flags(parser, "dataset", "output_dir", required=True)
    add_flags(parser, "teacher", "model_init_kwargs")
    common.add_analysis_arguments(parser, rows=16)
    parser.set_defaults(run=common.reporting(run_attention))


def run_attention(args: argparse.Namespace) -> Any:
    if args.prompt is not None and args.teacher is None:
        raise ValueError(f"`--prompt` is {args.prompt!r}, but whose prompt it is is not said. Pass `--teacher`, too.")
    labels = common.short_names([*args.model, *([args.teacher] if args.teacher else [])], "`--model` and `--teacher`")
    check_matplotlib()
    if args.teacher is not None:
        check_name("--teacher", args.teacher, token=args.model_init_kwargs.get("token"))
    tokenizer = common.shared_tokenizer(
        "--model", dict.fromkeys(labels, args.model_init_kwargs), args.trust_remote_code
    )
    rows = common.tokenized_rows(args, tokenizer, _ANSWERS_NEEDED if args.queries == "completion" else None)
    longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
    prompt = None if args.prompt is None else find_prompts(args.prompt)[-1]
    models: dict[str, Any] = {}
    for name, label in labels.items():
        virtual = 0 if prompt is None or name != args.teacher else len(prompt.embeddings)
        models[label] = common.load_model(name, args.model_init_kwargs, args.trust_remote_code, virtual + longest)
        shared_vocab_size(next(iter(models.values())), models[label], tokenizer)
    prompts = {}
    if prompt is not None:
        teacher, prompted = models[labels[args.teacher]], f"{labels[args.teacher]}, prompted"
        check_fits(prompt, teacher)
        models[prompted], prompts[prompted] = teacher, prompt.embeddings
    measures, heads = measure_attention(models, rows, prompts, args.queries)
    of_models = measures.groupby(level="model", sort=False)
    result = {"dataset": args.dataset, "queries": args.queries, "num_rows": len(rows)}
    result["num_queries"] = sum(num_queries(row, args.queries) for row in rows)
    result["measures"] = {name: of_model.to_dict("list") for name, of_model in of_models}
    result["heads"] = heads.to_dict("records")
    common.save(args, "attention.json", result)
    plot_measures(measures, common.plot_path(args, "attention_measures"))
    shown = heads.head(args.heads)
    if len(shown):
        matrices = head_matrices(models, rows[0], shown, prompts, args.queries)
        ids = rows[0]["prompt_ids"] + rows[0]["completion_ids"]
        tokens = [repr(tokenizer.decode([token]))[1:-1] for token in ids]
        plot_heads(matrices, shown, tokens, common.plot_path(args, "attention_heads"))

    def show() -> None:
        title = f"Attention of {result['num_queries']} tokens in {len(rows)} rows of {args.dataset}, means over layers"
        columns = [
            "entropy (nats)",
            "self focus",
            "sparsity (share > 0.1)",
            "likeness to layer before",
            "to soft prompt",
        ]
        means = of_models.mean()
        means.insert(0, "layers", of_models.size())
        print_table(title, ["model", "layers", *columns], list(means.itertuples()))
        lines = [
            [" / ".join(map(str, sorted(set(head.layers.values())))), head.head, f"{head.variance:.2e}"]
            for head in shown.itertuples()
        ]
        if lines:
            print_table("Heads in which the models differ most", ["layer", "head", "variance of a weight"], lines)
        print(f"Numbers and plots: {args.output_dir}")

    return result, show, 0
