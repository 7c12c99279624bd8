import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from trl_promptkd.generation import progress
from trl_promptkd.generation.rollouts import Rollouts, generate_completions


PROMPTS = [[7, 8, 9], [12], [14, 15], [16, 17]]
SETTINGS = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": [0]}


@pytest.fixture
def screen(monkeypatch, capsys):
    """What bars have written since the last call; they show from the first look on."""
    monkeypatch.setattr(progress, "_DELAY", 0)
    monkeypatch.setattr(progress, "_INTERVAL", 0)
    monkeypatch.setattr(progress, "_IN_FILES", 0)
    return lambda: capsys.readouterr().err


def counts(text):
    return [int(done) for done in re.findall(r"(\d+)/4 rows", text)]


def sample(row_seeds=range(4), batch_size=None, **settings):
    config = GenerationConfig(**{**SETTINGS, **settings})
    return generate_completions(
        tiny_model(), PROMPTS, config, batch_size, row_seeds=row_seeds, tokenizer=tiny_tokenizer()
    )


def early(completions):
    """How many rows end before the last token of their batch."""
    return sum(len(ids) < max(map(len, completions)) for ids in completions)


class TestRowsBar:
    def test_rows_count_when_they_finish_inside_a_batch(self, screen):
        seeds = next(
            range(start, start + 4)
            for start in itertools.count(0, 4)
            if len({len(ids) for ids in sample(range(start, start + 4))}) == 4
        )
        with progress.rows_bar(4, "Rows"):
            completions = sample(seeds)
        assert completions == sample(seeds)
        shown = counts(screen())
        assert sorted(set(shown)) == [0, 1, 2, 3, 4]
        assert shown == sorted(shown)

    def test_a_stop_string_finishes_a_row(self, screen):
        words = tiny_tokenizer().convert_ids_to_tokens(sample()[0][:2])
        with progress.rows_bar(4, "Rows"):
            completions = sample(stop_strings=[words[1]])
        finished = [number for number in counts(screen()) if number < 4]
        assert max(finished) >= early(completions) > 0

    def test_batches_add_up(self, screen):
        with progress.rows_bar(4, "Rows"):
            sample(batch_size=2)
        shown = counts(screen())
        assert shown == sorted(shown)
        assert {2, 4} <= set(shown)

    def test_the_time_left_counts_started_rows(self, monkeypatch):
        with progress.RowsBar(4, "Rows", shows=False) as bar:
            assert bar.format_dict["left"] == "?"
            elapsed = {"elapsed": 30.0}
            monkeypatch.setattr(progress.tqdm, "format_dict", property(lambda self: elapsed))
            bar.work = 1.0  # one of four rows, or two half-way
            assert bar.format_dict["left"] == "01:30"
            bar.work = 5.0  # a rank that was filled up
            assert bar.format_dict["left"] == "00:00"

    def test_nothing_shows_before_the_delay_and_nothing_stays(self, screen, monkeypatch):
        with progress.rows_bar(4, "Rows"):
            sample()
        text = screen()
        assert text.endswith("\r")
        assert not text.rsplit("\r", 2)[1].strip()
        assert "\n" not in text
        monkeypatch.setattr(progress, "_DELAY", 60)
        with progress.rows_bar(4, "Rows"):
            sample()
        assert screen() == ""

    def test_rows_are_looked_at_twice_a_second(self, screen, monkeypatch):
        """Each look waits for the device."""
        clock = itertools.count(0.0, 0.2)
        monkeypatch.setattr(progress, "_INTERVAL", 0.5)
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        looks, original = [], torch.isin
        monkeypatch.setattr(torch, "isin", lambda *args: looks.append(None) or original(*args))
        bar = progress.RowsBar(4, "Rows", shows=True)
        criterion = progress.FinishedRows(bar, 4, 0, 8, {0}, ())
        for _ in range(30):  # 6 seconds
            ended = criterion(torch.ones(4, 3, dtype=torch.long), None)
        bar.close()
        assert len(looks) == 10
        assert ended.tolist() == [False] * 4


class TestRollouts:
    def sample(self, accelerator=None, disable_tqdm=False):
        args = SimpleNamespace(
            seed=1, disable_tqdm=disable_tqdm, rollout_batch_size=2, gradient_checkpointing_kwargs=None
        )
        model, config = tiny_model(), GenerationConfig(**SETTINGS)
        rollouts = Rollouts(model, accelerator or Accelerator(cpu=True), tiny_tokenizer(), config, args, 40)
        return rollouts.sample(model, PROMPTS, 0)

    def test_show_their_rows(self, screen):
        assert self.sample() == self.sample(disable_tqdm=True)
        text = screen()
        assert "Sampling (student)" in text
        assert counts(text)[-1] == 4

    def test_are_silent_if_bars_are_disabled_or_on_another_rank(self, screen, monkeypatch):
        self.sample(disable_tqdm=True)
        monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
        self.sample()
        assert screen() == ""


def test_the_trainers_bar_stays(screen, promptkd):
    """The samples' bar comes and goes below it."""
    promptkd(disable_tqdm=False, max_steps=2).train()
    text = screen()
    assert "Sampling (student): " in text
    assert "2/2 [" in text.rsplit("\n", 2)[-2]
