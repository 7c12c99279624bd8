"""Progress while completions are sampled: how many rows have finished, and the time left.

A batch of rows ends with its longest one, which takes minutes. Rows finish one after another inside `generate`, so
they are counted there. The caller that knows the number of rows opens the bar, and
[`~trl_promptkd.generation.rollouts.generate_completions`] moves the open bar.
"""

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import StoppingCriteria


__all__ = ["FinishedRows", "RowsBar", "open_bar", "rows_bar"]

_DELAY = 1.5  # seconds before a bar shows: most windows of a small model take less
_INTERVAL = 0.5  # seconds between two looks at the rows, each of which waits for the device
_IN_FILES = 10.0  # seconds between two lines of a bar in a log
_FORMAT = "{desc}: {n_fmt}/{total_fmt} rows |{bar}| {elapsed}, {left} left"

_open: list["RowsBar"] = []  # at most one: bars do not nest


class RowsBar(tqdm):
    """
    A bar that counts finished rows, and disappears when it is closed.

    The time left is an estimate from the tokens. An unfinished row counts by its share of the longest allowed
    completion.
    """

    def __init__(self, total: int, title: str, shows: bool):
        self.whole_batches = 0  # rows of the batches before the one that is generated
        self.work = 0.0  # rows, with the started part of each
        super().__init__(
            total=total,
            desc=title,
            disable=not shows,
            leave=False,
            delay=_DELAY,
            mininterval=0 if sys.stderr.isatty() else _IN_FILES,
            miniters=0,
            bar_format=_FORMAT,
            dynamic_ncols=True,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        found = super().format_dict
        share = min(self.work / self.total, 1.0) if self.total else 0.0
        left = self.format_interval(found["elapsed"] * (1 - share) / share) if share else "?"
        return {**found, "left": left}

    def move_to(self, rows: int, work: float | None = None) -> None:
        """Show that `rows` rows have finished. `work` also counts the started part of the others."""
        rows = min(rows, self.total)  # ranks are filled up to equal numbers of rows
        self.work = rows if work is None else work
        self.update(rows - self.n)

    def end_batch(self, rows: int) -> None:
        """Count a finished batch of `rows` rows."""
        self.whole_batches += rows
        self.move_to(self.whole_batches)


class FinishedRows(StoppingCriteria):
    """
    Ends no row, but shows on a bar how many have ended.

    Args:
        bar: The bar to move.
        rows: Number of rows in the batch.
        width: Number of columns of the prompts.
        max_new_tokens: Longest completion, in tokens.
        ends: Tokens that end a row.
        stopped: Rows that have ended for another reason. It grows during generation.
    """

    def __init__(
        self, bar: RowsBar, rows: int, width: int, max_new_tokens: int, ends: Collection[int], stopped: Collection[int]
    ):
        self.bar, self.rows, self.width, self.max_new_tokens = bar, rows, width, max_new_tokens
        self.ends, self.stopped = torch.tensor(sorted(ends)), stopped
        self.looked = time.monotonic()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        now = time.monotonic()
        if now - self.looked >= _INTERVAL:
            self.looked = now
            new = input_ids[:, self.width :]
            ended = torch.isin(new, self.ends.to(new.device)).any(dim=1).tolist()
            finished = sum(is_ended or row in self.stopped for row, is_ended in enumerate(ended))
            share = new.size(1) / self.max_new_tokens
            before = self.bar.whole_batches
            self.bar.move_to(before + finished, before + finished + (self.rows - finished) * share)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def open_bar() -> RowsBar | None:
    """The open bar, if it is shown."""
    return _open[-1] if _open else None


@contextmanager
def rows_bar(total: int, title: str, shows: bool = True) -> Iterator[RowsBar]:
    """Show a bar while some rows are computed.

    Args:
        total: Number of rows.
        title: What the rows are.
        shows: `False` on ranks that are silent, and if the user wants no bars.
    """
    with RowsBar(total, title, shows and total > 0) as bar:
        if bar.disable:
            yield bar
            return
        _open.append(bar)
        try:
            yield bar
        finally:
            _open.pop()
