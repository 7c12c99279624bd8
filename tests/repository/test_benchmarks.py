"""The pages say what the kept results of the benchmarks say, and each benchmark runs."""

import importlib
import itertools
import json
import re

import pytest
import torch
from paths import ROOT
from pooling_server import PoolingServer
from tiny import answered_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from benchmarks import __main__ as runner
from benchmarks import common
from benchmarks.study import page_text


RESULTS = runner.kept_results()


class TestPages:
    def test_tables_are_made_of_the_kept_results(self, tmp_path):
        for name, result in RESULTS.items():
            page = runner.DOCS / runner.load(result["benchmark"]).PAGE
            copy = tmp_path / page.name
            copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
            page_text.fill(copy, runner.tables_of(name, result))
            assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
                f"{name}: run `python -m benchmarks pages`"
            )

    def test_sentences_elsewhere_are_true(self):
        for file, sentences in runner.sentences_of_all().items():
            assert page_text.missing((ROOT / file).read_text(encoding="utf-8"), sentences) == [], file

    def test_what_is_said_of_the_students_of_caches(self):
        """A preset changed less than other rows did, and plain top-k changed more."""
        result, module = RESULTS["cache-students"], runner.load("cache-students")
        students = result["students"]
        gaps = {name: abs(of["kl"] - students[module.LIVE]["kl"]) for name, of in students.items()}
        for name in students.keys() - {"start", module.LIVE, module.OTHER_ROWS}:
            assert (gaps[name] < gaps[module.OTHER_ROWS]) == (name in module.PRESETS), name
        top, standard = students["top-32, fp16"], students["standard"]
        assert top["bytes_per_token"] > standard["bytes_per_token"]
        assert top["kl"] > standard["kl"]

    def test_a_result_says_where_it_comes_from(self):
        for name, result in RESULTS.items():
            assert result["machine"].keys() >= {"cpu", "cores", "threads", "gpu", "commit"}, name
            versions = result["machine"]["versions"].keys()
            assert versions == {"torch", "transformers", "trl", "accelerate", "trl_promptkd"}, name


class TestCommand:
    def test_the_list_has_a_line_for_each_and_imports_none(self, monkeypatch):
        monkeypatch.setattr(importlib, "import_module", None)
        text = runner.make_parser().format_help()
        for name in runner.NAMES:
            assert re.search(rf"^  {name} +[A-Z].{{20,}}\.$", text, re.MULTILINE), name

    @pytest.mark.parametrize("name", runner.NAMES)
    def test_every_flag_has_a_word_of_help(self, name, capsys):
        with pytest.raises(SystemExit):
            runner.parse([name, "--help"])
        entries = re.split(r"^  (?=--)", capsys.readouterr().out, flags=re.M)[1:]
        assert len(entries) >= 3
        for entry in entries:
            assert len(re.sub(r"\(default:[^)]*\)|\{[^}]*\}", "", entry).split()) > 2, entry

    def test_an_unknown_name_is_refused(self, capsys):
        with pytest.raises(SystemExit):
            runner.parse(["step-tim"])
        assert "invalid choice: 'step-tim'" in capsys.readouterr().err


class TestClocks:
    def test_parts_within_parts_count_once_and_generation_is_one(self, monkeypatch):
        """Each look at the clock is a second later than the last."""
        monkeypatch.setattr(common, "finished", itertools.count().__next__)

        class Model:
            def forward(self):
                pass

            def head(self):
                self.forward()

            def generate(self):
                self.forward()

        model = Model()
        parts = common.Parts()
        with (
            parts.watch(model, "generate", "generation"),
            parts.watch(model, "head", "head"),
            parts.watch(model, "forward", "forward"),
        ):
            model.head()  # rest, head, forward, head
            model.generate()  # rest, generation 3 times
        assert parts.stop() == {"rest": 3, "head": 2, "forward": 1, "generation": 3}
        assert "forward" not in vars(model)

    def test_a_step_goes_on_where_the_last_one_ended(self, tmp_path):
        settings = common.bench_settings(tmp_path, use_cpu=True, per_device_train_batch_size=2, max_steps=5)
        student = tiny_model(seed=0)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        trainer = SFTTrainer(
            student, SFTConfig(**settings), train_dataset=answered_dataset(8), processing_class=tiny_tokenizer()
        )
        clock, steps = common.Clock(trainer), []
        for _ in range(3):
            seconds = clock.step()
            assert set(seconds) == {"rest"}
            steps.append(trainer.state.global_step)
        assert steps == [1, 2, 3]
        for name, value in student.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9)

    @pytest.fixture
    def order(self, monkeypatch):
        made = []

        class Clock:
            def __init__(self, trainer):
                self.trainer = trainer

            def step(self):
                made.append(self.trainer)
                return {"rest": float(len(made))}

        monkeypatch.setattr(common, "Clock", Clock)
        return made

    def test_trainers_take_turns_and_their_first_steps_do_not_count(self, order):
        makers = {name: (lambda name=name: name) for name in "abc"}
        _, found = common.steps_in_turn(makers, 3, once=["b"])
        assert "".join(order) == "abc" + "abc" + "ac" + "ac"
        assert {name: [step["rest"] for step in steps] for name, steps in found.items()} == {
            "a": [4, 7, 9],
            "b": [5],
            "c": [6, 8, 10],
        }

    def test_no_round_begins_that_would_end_too_late(self, order, monkeypatch):
        now = itertools.count()
        monkeypatch.setattr(common.time, "monotonic", lambda: 60 * next(now))  # looked at 2 times a round, and before
        _, found = common.steps_in_turn({"a": lambda: "a"}, 9, minutes=4.5)
        assert len(found["a"]) == 1


def test_the_slope_of_a_power_is_its_exponent():
    assert common.slope({x: 3 * x**1.5 for x in (1, 4, 10, 50)}) == pytest.approx(1.5)


def test_plain_top_k_keeps_the_likeliest_and_spreads_the_rest():
    kept = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()

    class Output:
        def logits(self, start, end):
            return kept[start:end] + 7.0  # not normalized

    found = runner.load("cache-students").TopK(Output(), 2).logits(0, 1).exp()
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.3, 0.2 / 3, 0.2 / 3, 0.2 / 3]]))


@pytest.mark.slow
class TestEachRuns:
    @pytest.fixture(scope="class")
    def models(self, tmp_path_factory):
        """Flags that name tiny models."""
        folder, flags = tmp_path_factory.mktemp("models"), []
        models = common.random_models(300, 32, 2, 1)
        for name in ("teacher", "student"):
            getattr(models, name).save_pretrained(folder / name)
            models.tokenizer.save_pretrained(folder / name)
            flags += [f"--{name}", str(folder / name)]
        return flags

    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def run(*flags):
            runner.main([*map(str, flags), "--threads", "1", "--output", str(tmp_path / "result.json")])
            result = json.loads((tmp_path / "result.json").read_text())
            module = runner.load(result["benchmark"])
            if hasattr(module, "draw"):
                pytest.importorskip("matplotlib")
                module.draw(result, tmp_path / "plot.svg")
                assert (tmp_path / "plot.svg").stat().st_size > 1000
            tables = module.tables(result)
            assert all("nan" not in table for table in tables.values())
            return result, tables

        return run

    def test_step_time(self, run, models):
        result, tables = run("step-time", *models, "--max_new_tokens", 8, "--repeats", 1, "--accumulation", 2)
        module = runner.load("step-time")
        assert result["steps"]["2"].keys() == set(module.METHODS)
        for method in module.METHODS:
            assert f"| {method} |" in tables["on-policy"] + tables["answers"]
            (step,) = result["steps"]["2"][method]
            assert ("generation" in step) == (method in module.ON_POLICY)
        plain, prompted = (result["profile"][name].keys() for name in ("DistillationTrainer", "PromptKD"))
        assert prompted == set(module.PARTS)
        assert plain == set(module.PARTS) - {"the prompt's backward pass"}

    def test_answers_have_as_many_tokens_as_samples(self):
        tokenizer = common.random_models(300, 32, 1, 1).tokenizer
        prompts = common.prompt_rows(None, tokenizer, rows=8)
        rows = runner.load("step-time").answered(prompts, tokenizer, 8)
        for row in rows:
            whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=False)
            assert len(whole) - len(tokenizer.apply_chat_template(row["prompt"], return_dict=False)) == 8

    def test_divergence_memory(self, run):
        sizes = ["--vocab_size", 20_000, "--hidden_size", 16, "--tokens", 1024]
        result, tables = run("divergence-memory", *sizes, "--methods", "GKDTrainer", "PromptKD")
        peaks = {method: found["1024"] for method, found in result["megabytes"].items()}
        logits = 1024 * 20_000 * 4 / 1e6  # MB, of which GKDTrainer has several copies
        assert peaks["GKDTrainer"] > 4 * logits
        assert peaks["PromptKD"] < peaks["GKDTrainer"] / 2
        assert f"1/{peaks['GKDTrainer'] / peaks['PromptKD']:.0f} of the memory of `GKDTrainer`" in tables["peak"]

    def test_memory_that_does_not_suffice(self):
        function = runner.load("divergence-memory").peak_of_a_step
        assert common.in_a_process(function, "GKDTrainer", 4096, 60_000, 16, most_gb=3.0) is None

    def test_scaling(self, run):
        sweeps = ["accumulation", "vocab_size"]
        result, tables = run("scaling", "--divide", 8, "--hidden_size", 32, "--repeats", 1, "--sweeps", *sweeps)
        assert list(result["seconds"]) == sweeps
        assert "`vocab_size` | 1,024, 4,096, 16,384" in tables["slopes"]

    def test_padding_free(self, run, models, tmp_path):
        rows = [{"instruction": f"t{i} " * i, "input": "", "output": "t5 " * (30 - i)} for i in range(4, 24)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags = ["--data_files", tmp_path / "rows.jsonl", "--batch_size", 4, "--repeats", 2]
        result, tables = run("padding-free", *models, *flags)
        padded, free = result["ways"].values()
        assert padded["tokens"] == free["tokens"]
        assert len(padded["seconds"]) == len(free["seconds"]) == 2
        assert all(tokens < places for tokens, places in zip(padded["tokens"], padded["places"], strict=True))
        assert "| padding-free |" in tables["rate"]

    def test_memory_table(self, run, models):
        result, tables = run("memory-table", *models, "--runs", "LoRA, 4 rows, accumulation 1, 32 new tokens")
        (found,) = result["measured"].values()
        assert 0.1 < found["peak"] < 3
        assert f"| {found['peak']:.2f} |" in tables["measured"]

    def test_teacher_cache(self, run, models, tmp_path):
        rows = [{"instruction": f"t{i} t{i + 1}", "input": "", "output": "t5 t6 t7 " * 8} for i in range(4, 24)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        result, tables = run("teacher-cache", *models[:2], "--data_files", tmp_path / "rows.jsonl", "--repeats", 1)
        assert result["settings"]["data_files"] == "rows.jsonl"
        kept = {name: values["kl_mean"] for name, values in result["kept"].items() if name != "tiny"}
        assert kept["exact"] == min(kept.values())
        assert "| **`standard`** |" in tables["kept"]

    def test_cache_students(self, run, models, tmp_path):
        rows = [{"instruction": f"t{i} t{i + 1}", "input": "", "output": f"t{i} t6 t7"} for i in range(4, 24)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sizes = ["--steps", 2, "--batch_size", 4, "--test_rows", 3]
        result, tables = run("cache-students", *models, "--data_files", tmp_path / "rows.jsonl", *sizes)
        students, module = result["students"], runner.load("cache-students")
        live = students[module.LIVE]
        assert len(live["rows"]) == 3
        assert live["kl"] < students["start"]["kl"]
        assert students["exact"]["kl"] == pytest.approx(live["kl"], rel=1e-3)
        assert module.minus_live(result, module.LIVE) == (0, 0)
        assert "| **`standard`** |" in tables["students"]

    def test_cache_memory(self, run):
        result, tables = run("cache-memory", "--gigabytes", 0.03, "--steps", 2, "--preset", "tiny")
        assert list(result["caches"]) == ["0.02 GB", "0.03 GB"]
        assert tables["memory"].count("MB") == 6

    def test_teacher_server(self, run, models):
        with PoolingServer(AutoModelForCausalLM.from_pretrained(models[1])) as server:
            flags = ["--server", server.url, "--rows", 2, "--tokens", 8, "--repeats", 1]
            result, tables = run("teacher-server", *models[:2], *flags)
        assert max(result["kl"].values()) < 1e-3
        assert "served, float32 on the wire" in tables["speed"]
