"""The scripts' command lines, and every recipe."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
# methods.md of the paper's scripts: student size -> (learning rate, batch, accumulation, epochs)
PAPER = {
    "promptkd_gpt2_120m": (5e-5, 2, 16, 20),
    "promptkd_gpt2_340m": (1e-5, 2, 4, 20),
    "promptkd_gpt2_760m": (5e-6, 2, 4, 15),
    "promptkd_opt_1.3b": (5e-6, 16, 1, 10),
    "promptkd_llama_7b": (5e-6, 16, 1, 10),
}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def promptkd():
    return load_script("promptkd")


def parse(script, path, *flags):
    return script.make_parser().parse_args_and_config(["--config", str(path), "--use_cpu", "--bf16", "false", *flags])


class TestRecipes:
    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_parses_without_an_unknown_key(self, promptkd, path, tmp_path):
        script_args, training_args, model_args, prompt_args = parse(promptkd, path, "--output_dir", str(tmp_path))
        given = yaml.safe_load(path.read_text())
        for name, value in given.items():
            owners = [a for a in (script_args, training_args, model_args, prompt_args) if hasattr(a, name)]
            assert owners, name
            if name not in ("output_dir", "bf16", "teacher_model_init_kwargs"):
                assert any(getattr(owner, name) == value for owner in owners), name

    @pytest.mark.parametrize("name", PAPER)
    def test_the_papers_settings(self, promptkd, name, tmp_path):
        _, args, _, prompt = parse(
            promptkd, ROOT / "examples" / "configs" / f"{name}.yaml", "--output_dir", str(tmp_path)
        )
        settings = (
            args.learning_rate,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.num_train_epochs,
        )
        assert settings == PAPER[name]
        assert (args.lr_scheduler_type, args.warmup_steps, args.weight_decay, args.max_grad_norm) == (
            "constant_with_warmup",
            100,
            1e-2,
            1.0,
        )
        assert (args.seed, args.lmbda, args.beta, args.temperature) == (10, 1.0, 1.0, 1.0)
        assert (prompt.num_virtual_tokens, prompt.prompt_init_text) == (7, "Suppose you are a student.")
        assert (prompt.prompt_learning_rate, prompt.prompt_weight_decay) == (None, 1e-2)

    def test_flags_win_over_the_file(self, promptkd, tmp_path):
        path = ROOT / "examples" / "configs" / "quickstart.yaml"
        _, args, model, prompt = parse(
            promptkd, path, "--output_dir", str(tmp_path), "--learning_rate", "3e-4", "--num_virtual_tokens", "11"
        )
        assert args.learning_rate == 3e-4
        assert prompt.num_virtual_tokens == 11
        assert model.use_peft is True


class TestScript:
    def test_instruction_template(self, promptkd):
        row = promptkd.from_instruction({"instruction": "Add.", "context": "1 and 2", "response": "3"})
        assert row["completion"] == "3"
        assert row["prompt"].startswith("Below is an instruction that describes a task, paired with an input")
        assert row["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
        bare = promptkd.from_instruction({"instruction": "Add.", "input": "", "output": "3"})
        assert "### Input:" not in bare["prompt"]
        assert "paired with an input" not in bare["prompt"]

    def test_make_help_lists_every_target(self):
        text = (ROOT / "Makefile").read_text()
        targets = re.findall(r"^([a-z-]+):", text, re.M)
        assert all(re.search(rf"^{target}:.*## \w", text, re.M) for target in targets)
        assert {"install", "style", "check", "test", "test-slow", "quickstart", "ci"} <= set(targets)
