# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-promptkd"]
# ///
"""Distil a student from a primed teacher: `trl-promptkd primed`, as a script.

accelerate launch examples/primed_distill.py --help
uv run examples/primed_distill.py --help
"""

import sys

from trl_promptkd.cli import main


if __name__ == "__main__":
    sys.exit(main(["primed", *sys.argv[1:]], launch=False))
