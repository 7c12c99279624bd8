"""`trl-promptkd promptkd | primed`: flags, files, data, runs, and what is said if one of them is wrong."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from commands import PROMPT, as_flags, short_settings
from peft import LoraConfig, get_peft_model
from tiny import save_rows
from transformers import AutoModelForCausalLM

from trl_promptkd.cli import launch, main, parse_args
from trl_promptkd.cli.common import priming_of
from trl_promptkd.cli.promptkd import from_instruction
from trl_promptkd.cli.training import ALIASES, DataArguments, load_splits
from trl_promptkd.models import init_kwargs


both = pytest.mark.parametrize("command", ["promptkd", "primed"])
ON_CPU = ("--use_cpu", "--bf16", "false", "--output_dir", "run")


def module_of(command):
    return importlib.import_module(f"trl_promptkd.cli.{command}")


def parsed(command, *words):
    return module_of(command).make_parser().parse_args_and_config([*words, *ON_CPU])


@pytest.fixture
def settings(tmp_path):
    return short_settings(tmp_path)


def said(capsys, *words):
    """What a command that is refused says: one line on standard error."""
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line and "examples [" not in line]  # a bar of `datasets`
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]


class TestHelp:
    """As a user sees it: `--help` shows what is ours and the usual flags, and `--help_all` everything."""

    def shown(self, command, capsys, flag="--help"):
        with pytest.raises(SystemExit) as end:
            main([command, flag])
        assert end.value.code == 0
        return capsys.readouterr().out

    @pytest.mark.parametrize("command", ["primed", "promptkd", "quickstart"])
    def test_every_flag_has_a_word_of_help(self, command, capsys):
        entries = re.split(r"^  (?=-)", self.shown(command, capsys), flags=re.M)[1:]
        assert len(entries) >= 3
        for entry in entries:
            assert len(re.sub(r"\(default:[^)]*\)", "", entry).split("\n\n")[0].split()) > 2, entry

    @both
    def test_usual_flags_come_first_and_others_with_help_all(self, command, capsys):
        flags, all_flags = (
            re.findall(r"^  (?:--\w+, )?(--\w+)$", self.shown(command, capsys, flag), re.M)
            for flag in ("--help", "--help_all")
        )
        assert flags[:3] == ["--model_name_or_path", "--teacher_model_name_or_path", "--dataset_name"]
        assert len(set(all_flags)) == len(all_flags)
        assert {"--loss_chunk_size", "--use_vllm", "--lora_r", "--eval_dataset", "--learning_rate"} <= set(flags)
        assert {"--adam_beta1", *flags} <= set(all_flags)
        assert "--adam_beta1" not in flags
        groups = module_of(command).make_parser().dataclass_types
        fields = [field for group in groups for field in group.__dataclass_fields__.values()]
        assert {f"--{field.name}" for field in fields if field.init} == set(all_flags)


class TestNames:
    """A field has TRL's name and, if that is long, a short one, as a flag and in a file."""

    VALUES = {"model": "a", "teacher": "b", "dataset": "c.jsonl"}

    def check(self, found):
        script, args, model = found[:3]
        assert (model.model_name_or_path, args.teacher_model_name_or_path, script.dataset_name) == (
            "a",
            "b",
            "c.jsonl",
        )

    @both
    def test_short_and_long_ones_are_the_same_flag(self, command):
        long = {ALIASES[name]: value for name, value in self.VALUES.items()}
        for values in (self.VALUES, long):
            self.check(parsed(command, *as_flags(values)))

    @both
    def test_in_a_file_too_and_flags_win(self, command, tmp_path):
        file = tmp_path / "run.yaml"
        long = {ALIASES[name]: value for name, value in self.VALUES.items()}
        for values in (self.VALUES, long):
            file.write_text(yaml.safe_dump(values))
            self.check(parsed(command, "--config", str(file)))
            file.write_text(yaml.safe_dump(values | {"model" if "model" in values else "model_name_or_path": "other"}))
            self.check(parsed(command, "--config", str(file), "--model", "a"))

    def test_both_in_one_file_are_refused(self, tmp_path, capsys):
        (tmp_path / "run.yaml").write_text("{model: a, model_name_or_path: b}")
        message = said(capsys, "promptkd", "--config", str(tmp_path / "run.yaml"))
        assert "holds both `model` and `model_name_or_path`" in message


class TestWrongFlags:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--learing_rate", "3"], "unrecognized arguments: --learing_rate"),
            (["rows.jsonl"], "unrecognized arguments: rows.jsonl"),
            (["--num_processes", "two"], "argument --num_processes/--num-processes: invalid int value: 'two'"),
            (["--config"], "argument --config: expected a YAML file"),
            (["--config", "nope.yaml"], "'nope.yaml'"),
            (["--config", "wrong.yaml"], "Unknown arguments from config file: ['--learing_rate', '3']"),
            (["--config", "list.yaml"], "list.yaml must contain a YAML mapping"),
            (["--config", "broken.yaml"], "while parsing a flow node"),
            (["--top_p", "7"], "`top_p` is 7.0"),
            (["--top_p", "x"], "argument --top_p/--top-p: invalid float value: 'x'"),
        ],
    )
    @both
    def test_one_line_says_which(self, command, flags, message, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for file, text in (("wrong", "learing_rate: 3"), ("list", "- 3"), ("broken", "a: [")):
            (tmp_path / f"{file}.yaml").write_text(text)
        assert message in said(capsys, command, *ON_CPU, *flags)

    @pytest.mark.parametrize("word", ["--learing_rate", "rows.jsonl"])
    def test_a_process_of_a_launcher_takes_no_flag_of_a_launcher(self, word, capsys):
        with pytest.raises(SystemExit):
            main(["promptkd", *ON_CPU, word], launch=False)
        assert f"not used by the HfArgumentParser: ['{word}']" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({}, "`--model` is missing"),
            ({"model": "nope"}, "`--model` is 'nope': there is no such folder"),
            ({"model": "student", "teacher": "nope"}, "`--teacher` is 'nope': there is no such folder"),
            ({"model": "student"}, "`--dataset` is missing"),
            ({"model": "student", "dataset": "nope.jsonl"}, "`--dataset` is 'nope.jsonl', and there is no such file"),
            ({"model": "student", "dataset": "me/rows"}, "`--dataset` is 'me/rows': there is no such folder"),
            (
                {"model": "student", "dataset": "rows.jsonl", "eval_dataset": "nope.jsonl", "eval_strategy": "epoch"},
                "`--eval_dataset` is 'nope.jsonl', and there is no such file",
            ),
        ],
    )
    @both
    def test_what_no_run_can_start_without(self, command, flags, message, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "student").mkdir()
        save_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat", "completion": " sat"}])
        assert message in said(capsys, command, *ON_CPU, *as_flags(flags))

    @pytest.mark.parametrize(
        ("command", "flags", "field"),
        [
            ("promptkd", ["--load_in_4bit", "true"], "--load_in_4bit"),
            ("doctor", ["--load_in_8bit", "true"], "--load_in_8bit"),
            (
                "primed",
                ["--model_init_kwargs", '{"quantization_config": {"load_in_8bit": true}}', "--use_peft", "true"],
                "model_init_kwargs['quantization_config']",
            ),
        ],
    )
    def test_a_quantization_without_its_extra(self, command, flags, field, settings, monkeypatch, capsys):
        monkeypatch.setattr(init_kwargs.importlib.util, "find_spec", lambda name: None)
        given = as_flags({name: settings[name] for name in ("model_name_or_path", "dataset_name")})
        message = said(capsys, command, *given, *(() if command == "doctor" else ON_CPU), *flags)
        assert f"`{field}` is set, but bitsandbytes is not installed" in message
        assert 'pip install "trl_promptkd[quantization]"' in message

    def test_two_priming_texts(self, settings, capsys):
        flags = as_flags(settings | {"priming": "teacher", "priming_text": "blue"})
        assert "`--priming` and `--priming_text` are both given; choose one" in said(capsys, "primed", *flags)


def test_yaml_names_several_teachers(tmp_path):
    given = {
        "teacher_model_name_or_path": {"math": "a/teacher"},
        "teacher_cache": {"code": "a/cache"},
        "priming": {"math": "ground_truth", "code": None},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    script, args, _ = parsed("primed", "--config", str(tmp_path / "run.yaml"))
    assert args.teacher_model_name_or_path == given["teacher_model_name_or_path"]
    assert script.teacher_cache == given["teacher_cache"]
    assert priming_of(script) == given["priming"]


class TestData:
    def test_parts_of_files(self, tmp_path):
        for name in ("a", "b"):
            save_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}"} for i in range(6)])
        files = {"dataset_name": str(tmp_path / "a.jsonl"), "eval_dataset": str(tmp_path / "b.jsonl")}
        args = DataArguments(**files, dataset_train_split="train[:4]", dataset_test_split="test[:2]")
        train, test = load_splits(args, wants_eval=True)
        assert (len(train), test["prompt"][:]) == (4, ["b0", "b1"])
        assert load_splits(args, wants_eval=False)[1] is None
        args.eval_dataset = None  # a file holds no other split
        assert load_splits(args, wants_eval=True)[1] is None

    def test_both_splits_of_a_folder(self, tmp_path):
        for name in ("train", "test"):
            save_rows(tmp_path / f"{name}.jsonl", [{"question": name}])
        train, test = load_splits(DataArguments(dataset_name=str(tmp_path)), True, "question")
        assert (train["prompt"][:], test["prompt"][:]) == (["train"], ["test"])

    def test_instruction_template(self):
        row = from_instruction({"instruction": "Add.", "context": "1 and 2", "response": "3"})
        assert row["completion"] == "3"
        assert row["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
        assert "### Input:" not in from_instruction({"instruction": "Add.", "input": "", "output": "3"})["prompt"]


class TestRuns:
    @both
    def test_an_adapters_folder_is_trained_further(self, command, settings, tmp_path):
        """With the tokenizer of the model below it."""
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=3)).save_pretrained(tmp_path / "lora")
        settings |= {"model_name_or_path": tmp_path / "lora"} | (PROMPT if command == "promptkd" else {})
        assert main([command, *as_flags(settings)]) == 0
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3

    @pytest.mark.filterwarnings("error")
    @both
    def test_nothing_is_warned_of_that_the_user_did_not_set(self, command, settings):
        """Deprecations among them: what newer versions of what is below us call otherwise is not a user's business."""
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
        settings |= PROMPT if command == "promptkd" else {"priming": "teacher"}
        assert main([command, *as_flags(settings)]) == 0

    def test_resumes_from_the_newest_checkpoint_and_leaves_a_state_for_reports(self, settings, tmp_path, capsys):
        settings |= PROMPT | {"save_strategy": "steps", "save_steps": 1}
        assert main(["promptkd", *as_flags(settings)]) == 0
        more = settings | {"max_steps": 2, "save_strategy": "no", "resume_from_checkpoint": True}
        assert main(["promptkd", *as_flags(more)]) == 0
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        capsys.readouterr()
        assert main(["promptkd", *as_flags(more | {"resume_from_checkpoint": "nowhere"})]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("trl-promptkd: `resume_from_checkpoint` is")

    def test_an_error_in_training_has_a_traceback(self, settings, monkeypatch, capsys):
        trainer_class = module_of("promptkd").PromptKDTrainer

        def fail(self, **kwargs):
            raise ValueError("at step 7")

        monkeypatch.setattr(trainer_class, "train", fail)
        assert main(["promptkd", *as_flags(settings | PROMPT)]) == 1
        assert re.search(r"Traceback.*ValueError: at step 7$", capsys.readouterr().err.strip(), re.DOTALL)


class TestLaunch:
    """Who starts the processes of a training command."""

    @pytest.fixture
    def launched(self, monkeypatch):
        """What `accelerate launch` gets."""
        given = []
        launcher = launch.accelerate_launcher()
        launcher.launch_command = given.append
        launcher.default_config_file = "nowhere"
        monkeypatch.setattr(launch, "accelerate_launcher", lambda: launcher)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        yield given
        AcceleratorState._reset_state(reset_partial_state=True)  # of a process that has only the rank of one

    @both
    def test_flags_of_accelerate_are_taken_out_wherever_they_stand(self, command, launched):
        words = ["--num_processes", "2", "--model", "a", "--accelerate_config", "fsdp2", "--learning_rate", "1e-4"]
        assert main([command, *words]) == 0
        (args,) = launched
        assert (args.module, args.training_script, args.num_processes) == (True, "trl_promptkd.cli", 2)
        assert args.config_file.endswith("fsdp2.yaml")
        assert args.training_script_args == [command, "--model", "a", "--learning_rate", "1e-4"]

    def test_several_processes_without_a_gpu_are_refused(self, launched, monkeypatch, capsys):
        """`accelerate launch` would start one, without a word."""
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            main(["promptkd", "--model", "a", "--num_processes", "2"])
        assert "torchrun --nproc_per_node 2 -m trl_promptkd.cli promptkd" in capsys.readouterr().err

    def test_a_file_may_stand_behind_an_equals_sign(self, launched, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        assert main(["promptkd", "--config=run.yaml"]) == 0
        assert launched[0].training_script_args == ["promptkd", "--config", "run.yaml"]

    def test_several_gpus_have_a_process_each(self, launched, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        words = ["--config", "run.yaml", "--max_steps", "3"]
        assert main(["promptkd", *words]) == 0
        assert launched[0].training_script_args == ["promptkd", *words]

    def test_a_process_of_a_launcher_starts_no_other(self, launched, settings, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        flags = ["promptkd", *as_flags(settings)]
        assert parse_args(flags, launch=False).run.__name__ == "<lambda>"
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(SystemExit):
            main([*flags, "--num_processes", "2"])
        assert launched == []

    def test_no_flag_of_accelerate_is_taken_for_one_of_the_training(self, launched):
        """By itself or as the start of a longer one. Two are both's, and the training's here, as in TRL."""
        options = launch.accelerate_launcher().launch_command_parser()._option_string_actions
        for command in ("promptkd", "primed"):
            parser = module_of(command).make_parser()
            taken = {
                word
                for word in options
                if (word.startswith("--") and parser._get_option_tuples(word)) or word in parser._option_string_actions
            }
            same = {"--debug", "--gradient_accumulation_steps", "--gradient-accumulation-steps"}
            assert taken == {*same, "--help", "-h"}


@pytest.mark.slow
class TestProcesses:
    def run(self, *words):
        code = "import sys; from trl_promptkd.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "primed", *words, "--num_processes", "1", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        environment = {**os.environ, "CI": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    def test_the_command_trains_under_accelerate_launch(self, settings, tmp_path):
        result = self.run(*as_flags(settings))
        assert result.returncode == 0, result.stderr[-3000:]
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_what_is_wrong_is_said_once(self, settings):
        result = self.run(*as_flags(settings | {"model_name_or_path": "nope"}))
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert result.stderr.count("`--model` is 'nope': there is no such folder") == 1
