"""What is in data sets, and in their rows."""

from functools import partial

from bad_arguments import evaluate
from case import Case, by_api, from_cache, primed, promptkd, without
from datasets import Dataset, DatasetDict
from tiny import CHAT_TEMPLATE, answered_dataset, chat_dataset, prompt_dataset, tiny_tokenizer

from trl_promptkd import PrimingTemplate


USER, ANSWER = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}
TOOL_CALL = {"role": "assistant", "content": "sat", "tool_calls": [{"function": {"name": "cat"}}]}
TEXT_OR_MESSAGES = "a text or a list of messages"
ROLE_AND_CONTENT = "a role and a content"
WHOLE_NUMBERS = "a list of whole numbers"


def data(does, says, run=primed, error=ValueError, **settings):
    """A data set that a trainer refuses."""
    return Case(does, partial(run, **settings), says, error)


def row(does, says, run=primed, **row):
    """A data set of one bad row."""
    return data(does, says, run, rows=[row])


def refusing():
    tokenizer = tiny_tokenizer()
    refusal = "{% if messages | length > 1 %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    return tokenizer


DATASETS = [
    data(
        "`train_dataset='trl-lib/...'`",
        "`train_dataset` is a str | a `datasets.Dataset`",
        error=TypeError,
        train_dataset="trl-lib/ultrafeedback-prompt",
    ),
    data(
        "a list of rows as `eval_dataset`",
        "`eval_dataset` is a list | a `datasets.Dataset`",
        error=TypeError,
        eval_dataset=[{"prompt": "the"}],
    ),
    data(
        "all splits at once (`DatasetDict`)",
        "`train_dataset` is a DatasetDict with the keys ['train'] | Pass one split",
        error=TypeError,
        train_dataset=DatasetDict(train=answered_dataset(2)),
    ),
    data(
        "a data set without rows",
        "`train_dataset` is empty | Check its path, split and filters",
        train_dataset=Dataset.from_dict({"prompt": [], "completion": []}),
    ),
    row("only a column `text`", "`train_dataset` has neither | its columns are ['text'] | Rename a column", text="x"),
    data(
        "only a column `text` in one of several `eval_dataset`s",
        "`eval_dataset['a']` has neither | its columns are ['text'] | Rename a column",
        eval_dataset={"a": Dataset.from_list([{"text": "x"}])},
    ),
    data(
        "prompts without answers, `PrimedDistillTrainer`",
        "`train_dataset` holds prompts without answers | Set `response_source='teacher'`",
        train_dataset=prompt_dataset(2),
    ),
    data("prompts without answers, `lmbda=0.5`", "`lmbda` | Set `lmbda=1.0`", promptkd, args={"lmbda": 0.5}),
    data(
        "answers that are all empty",
        "2 of 2 answers in `train_dataset` are empty | Check how the data was made",
        rows=[{"prompt": "the", "completion": ""}, {"prompt": "cat", "completion": " "}],
    ),
    data(
        "prompts longer than `max_length`",
        "1 of 1 prompts in `train_dataset` do not fit into `max_length=20` | Set `max_length` to at least 50",
        promptkd,
        rows=[{"prompt": "the " * 50}],
        args={"max_length": 20},
    ),
    data(
        "a priming text that leaves no room in `teacher_max_length`",
        "4 of 4 rows | `teacher_max_length=4` | Set `teacher_max_length` to at least",
        args={"teacher_max_length": 4},
        priming="teacher",
    ),
    data(
        "streamed data with `response_source='teacher'`",
        "`train_dataset` is streamed | Load it without streaming",
        train_dataset=prompt_dataset(2).to_iterable_dataset(),
        args={"response_source": "teacher"},
    ),
    data(
        "streamed data with a teacher cache",
        "`train_dataset` is streamed | Load it without streaming",
        from_cache,
        train_dataset=answered_dataset(4).to_iterable_dataset(),
    ),
    data(
        "rows that are not in the teacher cache",
        "2 of 6 rows in `train_dataset` are not in the teacher cache | Build the cache with these rows",
        from_cache,
        train_dataset=answered_dataset(6),
    ),
    data(
        "a priming text with a column that is not there",
        "'gold', which `train_dataset` does not have | Rename or add a column",
        priming=PrimingTemplate("{{ gold }}"),
    ),
    data(
        "`PrimingTemplate(text, 'system')` and plain texts",
        "`placement='system'` needs conversations | Use 'prefix' or 'suffix'",
        priming=PrimingTemplate("x", "system"),
    ),
    data(
        "a priming text, and a conversation without user",
        "no user message | ['system'] | Use `placement='system'`",
        rows=[{"messages": [{"role": "system", "content": "a"}, ANSWER]}],
        priming="teacher",
    ),
    data(
        "a priming text, and tokenized rows",
        "no `teacher_prompt_ids` | Add `teacher_prompt_ids`",
        rows=[{"prompt_ids": [7], "completion_ids": [8]}],
        priming="teacher",
    ),
    data(
        "roles that the chat template does not allow",
        "['user', 'assistant']: Roles must alternate | Change the data",
        train_dataset=chat_dataset(2),
        processing_class=refusing(),
    ),
    data(
        "conversations, and a tokenizer without chat template",
        "the tokenizer has no chat template | Use an instruction-tuned model's tokenizer",
        train_dataset=chat_dataset(2),
        processing_class=without("chat_template"),
    ),
]
ROWS = [
    data(
        "an answer that is `None`",
        "1 of 2 rows in `train_dataset` have no answer | Set `response_source='teacher'`",
        rows=[{"prompt": "the", "completion": "cat"}, {"prompt": "the", "completion": None}],
    ),
    data(
        "a prompt that is `None`",
        "Row 1 of `train_dataset` | neither a prompt nor messages | Filter such rows out",
        rows=[{"prompt": "the", "completion": "cat"}, {"prompt": None, "completion": "cat"}],
    ),
    row("a prompt that is `''`", "Row 0 of `train_dataset` | no tokens | Filter such rows out", promptkd, prompt=""),
    row("a prompt that is a number", f"`prompt` is 3 | {TEXT_OR_MESSAGES}", prompt=3, completion="x"),
    row("a prompt of two texts", f"`prompt` is ['the', 'cat'] | {TEXT_OR_MESSAGES}", promptkd, prompt=["the", "cat"]),
    row("a prompt that is one message, not a list", f"`prompt` is {USER} | {TEXT_OR_MESSAGES}", promptkd, prompt=USER),
    row("a prompt that is an empty list", "`prompt` is an empty list | Filter such rows out", promptkd, prompt=[]),
    row("an answer that is a number", f"`completion` is 4.5 | {TEXT_OR_MESSAGES}", prompt="the", completion=4.5),
    row(
        "a text as prompt, messages as answer",
        "`prompt` is a text, but its `completion` a list of messages | Make both",
        prompt="the cat",
        completion=[ANSWER],
    ),
    row(
        "an answer with the role `user`",
        "`completion` must end with an assistant message | ['user'] | Filter such rows out",
        prompt=[USER],
        completion=[USER],
    ),
    row("`messages` that are a text", "`messages` is 'the cat' | a list of messages", messages="the cat"),
    row("`messages` that are texts", "`messages` is ['the', 'cat'] | a list of messages", messages=["the", "cat"]),
    row(
        "`messages` in ShareGPT's form",
        f"{{'from': 'human', 'value': 'a'}} | {ROLE_AND_CONTENT}",
        messages=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    ),
    row(
        "a message without content",
        f"{ {'role': 'assistant', 'content': None} } | {ROLE_AND_CONTENT}",
        messages=[USER, {"role": "assistant", "content": None}],
    ),
    row(
        "a message whose content is a number",
        f"{ {'role': 'user', 'content': 3} } | {ROLE_AND_CONTENT}",
        messages=[{"role": "user", "content": 3}, {"role": "assistant", "content": 4}],
    ),
    row(
        "`messages` without an answer at their end",
        "must end with an assistant message | Rows without an answer go into a `prompt` column",
        promptkd,
        messages=[USER],
    ),
    row("`messages` that hold an answer only", "an answer only | must come before it", messages=[ANSWER]),
    row(
        "an answer that calls a tool, and a chat template that leaves calls out",
        "ignores `tool_calls` | Use a template that writes tool calls",
        messages=[USER, {**TOOL_CALL, "content": None}],
    ),
    row(
        "a prompt that ends with a call of a tool",
        "`prompt` ends with an assistant message that calls a tool | Add the tool's result",
        promptkd,
        prompt=[USER, TOOL_CALL],
    ),
    row(
        "a content part that is an image",
        "`prompt` | 'image' | Filter such rows out",
        promptkd,
        prompt=[{**USER, "content": [{"type": "image", "image": "cat.png"}]}],
    ),
    row(
        "a column of images",
        "`images` column is not empty | Filter such rows out",
        promptkd,
        prompt="the cat",
        images=["cat.png"],
    ),
    row("`tools` that are a number", "`tools` are 3 | a list of JSON schemas", messages=[USER, ANSWER], tools=3),
    row(
        "`chat_template_kwargs` that are a text",
        "`chat_template_kwargs` are 'x' | a dict",
        messages=[USER, ANSWER],
        chat_template_kwargs="x",
    ),
    row("tokenized rows with an empty prompt", "no tokens | Filter", promptkd, prompt_ids=[], completion_ids=[7]),
    row(
        "tokenized rows with a negative id",
        "`prompt_ids` hold the id -1 | Tokenize the data with",
        promptkd,
        prompt_ids=[-1, 7],
    ),
    row(
        "tokenized rows with ids of another tokenizer",
        "`completion_ids` hold the id 999 | go up to 39 | Tokenize the data with",
        prompt_ids=[7],
        completion_ids=[999],
    ),
    row(
        "tokenized rows with texts for ids",
        f"`prompt_ids` are 'the cat' | {WHOLE_NUMBERS}",
        prompt_ids="the cat",
        completion_ids=[7],
    ),
    row(
        "tokenized rows with one id for a list",
        f"`completion_ids` are 7 | {WHOLE_NUMBERS}",
        prompt_ids=[7],
        completion_ids=7,
    ),
]
BY_API = [
    row(
        "`teacher_answers_url` with tokenized rows",
        "`prompt_ids`, but a server is sent texts | Pass the rows as texts or messages",
        by_api,
        prompt_ids=[7],
        teacher_prompt_ids=[7],
    ),
    row(
        "`teacher_answers_url` with `tools`",
        "has `tools`, but only answers that are texts | Filter such rows out",
        by_api,
        prompt=[USER],
        tools=[{"type": "function"}],
    ),
    row(
        "`teacher_answers_url` with a prompt that ends with an assistant message",
        "ends with an assistant message, but a server | end their prompts with the question",
        by_api,
        prompt=[USER, ANSWER],
    ),
]
EVALUATED = [
    row(
        "`evaluate_model` with rows that have none of the columns it reads",
        "Row 0 of `rows` | its columns are ['text'] | Rename columns",
        evaluate,
        text="the cat",
    ),
    row(
        "`evaluate_model` with an empty `instruction`",
        "`instruction` is '' | Filter such rows out",
        evaluate,
        instruction="",
        output="sat",
    ),
    row(
        "`evaluate_model` with `messages` that end with the user's turn, and no `references`",
        "`messages` | an assistant message | Filter such rows out",
        evaluate,
        messages=[USER],
    ),
    row(
        "`evaluate_model` with a row without a right answer",
        "right answer is None | a text or a list of texts",
        evaluate,
        instruction="the cat",
        output=None,
    ),
    row(
        "`task='gsm8k'` with a right answer without a number",
        "right answer is 'unknown' | Give the right answer as a number",
        partial(evaluate, task="gsm8k"),
        question="the cat",
        answer="unknown",
    ),
    row(
        "`max_prompt_length` below all prompts",
        "all 1 prompts are longer than `max_prompt_length=2` | Raise it",
        partial(evaluate, max_prompt_length=2),
        prompt="the cat sat",
        completion="on",
    ),
]
CASES = DATASETS + ROWS + BY_API + EVALUATED
