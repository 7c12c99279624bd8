# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-promptkd"]
# ///
"""Distil a student from a prompted teacher: `trl-promptkd promptkd`, as a script.

accelerate launch examples/promptkd.py --help
uv run examples/promptkd.py --help
"""

import sys

from trl_promptkd.cli import main


if __name__ == "__main__":
    sys.exit(main(["promptkd", *sys.argv[1:]], launch=False))
