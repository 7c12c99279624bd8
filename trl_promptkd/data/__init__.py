"""From a user's rows to token ids, once before training, and from token ids to padded batches."""

from .chat_template import RewrittenPromptError
from .collate import (
    DataCollatorForPromptCompletion,
    count_trained_tokens,
    grouped_by_length,
    masked_rows,
    pad_rows,
    warn_if_untrained,
    without_repeats,
)
from .dataset import check_columns, name_columns, plain_rows, tokenize_dataset
from .rows import check_text_only, split_row
from .tokenize import tokenize_primed_row, tokenize_row


__all__ = [
    "DataCollatorForPromptCompletion",
    "RewrittenPromptError",
    "check_columns",
    "check_text_only",
    "count_trained_tokens",
    "grouped_by_length",
    "masked_rows",
    "name_columns",
    "pad_rows",
    "plain_rows",
    "split_row",
    "tokenize_dataset",
    "tokenize_primed_row",
    "tokenize_row",
    "warn_if_untrained",
    "without_repeats",
]
