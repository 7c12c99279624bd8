"""`trl-promptkd report`."""

import argparse
import os

from ..analysis.report import read_run, report_page
from ..files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--output", default="report.html", help="file of the page (%(default)s)")
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> int:
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    page, signs = report_page(read_run(args.run_folder))
    write_text(args.output, page)
    for sign in signs:
        if sign.verdict == "wrong":
            print(f"{sign.name}. {sign.text}")
    print(f"The report is in {args.output}.")
    return 0
