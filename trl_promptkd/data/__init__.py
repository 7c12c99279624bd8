"""From a user's rows to token ids, and from token ids to padded batches.

A row becomes two lists of ids, `prompt_ids` and `completion_ids`, once, before training.

- `rows.py`: what a row says
- `chat_template.py`: its text, if it is a conversation
- `tokenize.py`: its token ids
- `dataset.py`: a whole data set's, checked and counted
- `priming.py`, `primed.py`: what the teacher sees instead, and both views of a row
- `collate.py`: batches of them
"""

from .chat_template import RewrittenPromptError
from .collate import (
    DataCollatorForPromptCompletion,
    count_trained_tokens,
    grouped_by_length,
    masked_rows,
    pad_rows,
    without_repeats,
)
from .dataset import (
    check_answers,
    check_columns,
    is_empty_answer,
    map_rows,
    name_columns,
    plain_rows,
    sift_overlong,
    tokenize_dataset,
)
from .rows import NO_TOKENS, check_ids, check_text_only, is_blank, joined_text, split_row
from .tokenize import _without_blank_tail as _without_blank_tail
from .tokenize import tokenize_row, tokenize_views


__all__ = [
    "NO_TOKENS",
    "DataCollatorForPromptCompletion",
    "RewrittenPromptError",
    "check_answers",
    "check_columns",
    "check_ids",
    "check_text_only",
    "count_trained_tokens",
    "grouped_by_length",
    "is_blank",
    "is_empty_answer",
    "joined_text",
    "map_rows",
    "masked_rows",
    "name_columns",
    "pad_rows",
    "plain_rows",
    "sift_overlong",
    "split_row",
    "tokenize_dataset",
    "tokenize_row",
    "tokenize_views",
    "without_repeats",
]
