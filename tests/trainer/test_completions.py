import os
import random
import sys
from types import SimpleNamespace

import numpy
import pandas
import pytest
import trl
from packaging.version import Version
from rich.console import Console
from trainers import logged
from transformers import Trainer

from trl_promptkd.trainer import completions


KLS = {"promptkd": ["kl/student_prompted", "kl/student_plain"], "primed": ["kl/student_teacher"]}


def run(make, **settings):
    source = {} if make.method == "promptkd" else {"response_source": "student"}
    window = {"gradient_accumulation_steps": 3, "log_completions": True}
    trainer = make(**{**window, **source, **settings})
    trainer.train()
    return trainer


def table_of(trainer, step=1):
    return pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_{step:05d}.parquet")


class Tracker(SimpleNamespace):
    """Stands in for wandb or trackio."""

    def __init__(self, run="a run"):
        super().__init__(run=run, Table=lambda dataframe: dataframe, logged=[])
        self.log = self.logged.append


@pytest.fixture
def tracker(monkeypatch):
    """Makes a stand-in for a module, to which no callback reports."""

    def tracker(name, **settings):
        monkeypatch.setattr(Trainer, "__init__", _without_reports(Trainer.__init__, name))
        made = Tracker(**settings)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return tracker


def _without_reports(original, name):
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.args.report_to = [name]

    return init


class TestTable:
    def test_has_length_end_and_kl_of_every_row_of_the_window(self, make):
        trainer = run(make, max_new_tokens=30)
        table = table_of(trainer)
        assert list(table) == ["step", "prompt", "completion", "length", "ended", *KLS[make.method]]
        assert len(table) == 6
        assert table["ended"].dtype == bool
        assert table["length"].mean() == pytest.approx(logged(trainer, "rollout/mean_length")[0])
        assert table["ended"].mean() == pytest.approx(logged(trainer, "rollout/terminated_share")[0])
        assert 0 < table["ended"].sum() < 6
        for row in table.itertuples():
            assert row.ended == row.completion.endswith("<eos>")
            assert row.length == len(row.completion.split())
        for name in KLS[make.method]:
            weighted = numpy.average(table[name], weights=table["length"])
            assert weighted == pytest.approx(logged(trainer, name)[0], rel=1e-4)
            assert table[name].nunique() == 6

    def test_kls_are_those_of_the_rows_alone(self, make):
        """Each row in a micro-batch of its own gives that row's KL as the logged mean."""
        names = KLS[make.method]
        settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "max_steps": 2}
        trainer = run(make, **settings)
        for step in (1, 2):
            (row,) = table_of(trainer, step).to_dict("records")
            for name in names:
                assert row[name] == pytest.approx(logged(trainer, name)[step - 1], rel=1e-4)

    def test_training_is_the_same_without_it(self, make):
        with_table, without = run(make, max_steps=2), run(make, max_steps=2, log_completions=False)
        assert logged(with_table, "loss") == logged(without, "loss")

    def test_only_the_logged_step_pays_for_it(self, make, monkeypatch):
        steps, original = [], completions.row_kls
        monkeypatch.setattr(
            completions, "row_kls", lambda *args, **kwargs: steps.append(None) or original(*args, **kwargs)
        )
        run(make, max_steps=4, logging_steps=2, gradient_accumulation_steps=1)
        assert len(steps) == 2 * len(KLS[make.method])
        steps.clear()
        run(make, log_completions=False)
        assert steps == []

    def test_the_students_rows_alone_are_shown_in_a_mixture(self, promptkd):
        trainer = run(promptkd, lmbda=0.5, gradient_accumulation_steps=4)
        table = table_of(trainer)
        assert 0 < len(table) < 8
        assert table["kl/student_plain"].notna().all()

    def test_a_window_without_samples_has_no_table(self, promptkd):
        """And not that of an earlier one."""
        settings = {"lmbda": 0.5, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "max_steps": 8}
        trainer = run(promptkd, **settings)
        steps = [entry["step"] for entry in trainer.state.log_history if "rollout/mean_length" in entry]
        tables = sorted(os.listdir(f"{trainer.args.output_dir}/completions"))
        assert tables == [f"completions_{step:05d}.parquet" for step in steps]
        assert 0 < len(tables) < 8

    def test_nothing_is_said_about_parquet(self, make, capsys):
        run(make)
        assert "parquet" not in "".join(capsys.readouterr())


@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="TRL 1.15 prints 80 columns, whatever there are"
)
class TestPrinted:
    def test_are_four_rows_with_the_same_columns(self, make, capsys, monkeypatch):
        monkeypatch.setattr(Console, "_environ", {"COLUMNS": "200"})  # whatever rich took for the environment
        trainer = run(make)
        printed = capsys.readouterr().out
        assert printed.count("├─") == 3
        for name in ("length", "ended", *KLS[make.method]):
            assert f"┃ {name.replace('/', ' ').replace('_', ' ')} " in printed
        first = table_of(trainer).iloc[0]
        assert f"{first[KLS[make.method][0]]:.2f}" in printed

    def test_are_the_first_rows_and_not_drawn_from_pythons_random_state(self, promptkd, capsys, monkeypatch):
        monkeypatch.setattr(random, "sample", None)
        monkeypatch.setattr(Console, "_environ", {"COLUMNS": "200"})  # whatever rich took for the environment
        first, *others = table_of(run(promptkd, num_completions_to_print=1))["completion"]
        printed = capsys.readouterr().out
        assert first in printed
        assert not any(other in printed for other in others)

    @pytest.mark.parametrize(("number", "rows"), [(0, 0), (None, 6)])
    def test_may_be_none_or_all(self, promptkd, capsys, number, rows):
        trainer = run(promptkd, num_completions_to_print=number)
        assert capsys.readouterr().out.count("├─") == max(rows - 1, 0)
        assert len(table_of(trainer)) == 6


class TestTrackers:
    @pytest.mark.parametrize("name", ["wandb", "trackio"])
    def test_get_the_printed_rows_as_a_table(self, make, tracker, name):
        backend = tracker(name)
        trainer = run(make)
        (entry,) = backend.logged
        assert list(entry) == ["completions"]
        assert entry["completions"].equals(table_of(trainer).head(4))

    def test_a_wandb_without_a_run_gets_nothing(self, promptkd, tracker):
        backend = tracker("wandb", run=None)
        run(promptkd)
        assert backend.logged == []

    def test_nothing_is_sent_without_rows(self, promptkd, tracker):
        backend = tracker("wandb")
        run(promptkd, num_completions_to_print=0)
        run(promptkd, lmbda=0.0)
        run(promptkd, log_completions=False)
        assert backend.logged == []
