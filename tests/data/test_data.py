"""Whole data sets, and batches of their rows."""

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from tiny import answered_dataset, chat_dataset
from trl.trainer.utils import remove_none_values

from trl_promptkd import PrimingTemplate
from trl_promptkd.data import (
    DataCollatorForPromptCompletion,
    grouped_by_length,
    name_columns,
    pad_rows,
    tokenize_dataset,
)
from trl_promptkd.data.primed import tokenize_primed_dataset


CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]
THE, CAT, SAT, ON = 12, 13, 15, 16
USER, ASSISTANT, EOS = 2, 3, 0
NEEDED = "`lmbda` is below 1."


def rows_of(*completions, prompt="the"):
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for completion in completions])


class TestPadRows:
    def test_literal_tensors_with_pad_equal_to_eos(self):
        batch = pad_rows([[7, 8, 9], [10]], [[11, EOS], [12, 13, EOS]], pad_token_id=EOS)
        assert batch["input_ids"].tolist() == [[7, 8, 9, 11, 0, 0], [0, 0, 10, 12, 13, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
        assert batch["labels"].tolist() == [[-100, -100, -100, 11, 0, -100], [-100, -100, -100, 12, 13, 0]]
        assert batch["prompts"].tolist() == [[7, 8, 9], [0, 0, 10]]
        assert batch["prompt_attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]

    def test_collator(self):
        rows = [{"prompt_ids": [7, 8], "completion_ids": [9]}, {"prompt_ids": [7], "completion_ids": []}]
        batch = DataCollatorForPromptCompletion(pad_token_id=5)(rows)
        assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 7, 5]]
        assert (batch["labels"] != -100).sum() == 1
        assert batch["input_ids"].dtype == torch.int64

    def test_rows_are_grouped_by_length_longest_first(self):
        assert grouped_by_length([3, 9, 1, 7, 5], [2, 2, 1]) == [[1, 3], [4, 0], [2]]


def test_named_columns_become_a_conversation_and_the_others_stay():
    dataset = Dataset.from_dict({"question": ["the cat"], "answer": ["sat"], "topic": ["mat"]})
    (row,) = name_columns(dataset, "question", "answer", conversational=True)
    assert row == {"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": "sat"}], "topic": "mat"}
    assert name_columns(Dataset.from_dict({"prompt": ["a"]}), "prompt")["prompt"][:] == ["a"]
    message = r"`prompt_column` is 'quest'; the columns are \['answer', 'question', 'topic'\]"
    with pytest.raises(ValueError, match=message):
        name_columns(dataset, "quest")


class TestTokenizeDataset:
    @pytest.mark.parametrize("make", [answered_dataset, chat_dataset])
    def test_columns_are_replaced_and_streamed_rows_are_the_same(self, make, tokenizer):
        dataset = tokenize_dataset(make(4), "x", tokenizer, 64, NEEDED)
        assert sorted(dataset.column_names) == ["completion_ids", "length", "prompt_ids"]
        assert all(ids[-1] == EOS for ids in dataset["completion_ids"])
        streamed = tokenize_dataset(make(4).to_iterable_dataset(), "x", tokenizer, 64, NEEDED)
        assert isinstance(streamed, IterableDataset)
        assert list(streamed) == dataset.to_list()

    def test_long_prompts_are_counted_and_refused_or_left_out(self, tokenizer, caplog, propagate):
        dataset = Dataset.from_list([{"prompt": "the " * n} for n in (3, 9, 12)])
        stream = dataset.to_iterable_dataset()
        found = "2 of 3 prompts in `x` do not fit into `max_length=8`."
        with pytest.raises(ValueError, match=f"{found} Set `max_length` to at least 12"):
            tokenize_dataset(dataset, "x", tokenizer, 8)
        with pytest.raises(ValueError, match="One of the prompts does not fit"):
            list(tokenize_dataset(stream, "x", tokenizer, 8))
        with caplog.at_level(logging.WARNING):
            rows = tokenize_dataset(dataset, "x", tokenizer, 8, overlong="drop")
        streamed = list(tokenize_dataset(stream, "x", tokenizer, 8, overlong="drop"))
        assert rows.to_list() == streamed == [{"prompt_ids": [THE] * 3, "completion_ids": [], "length": 3}]
        assert f"{found} They are left out." in caplog.text
        with pytest.raises(ValueError, match=r"no row remains. Set `max_length` to at least 12"):
            tokenize_dataset(dataset, "x", tokenizer, 2, overlong="drop")

    def test_a_prompt_may_fill_max_length_if_no_answer_follows_it(self, tokenizer):
        dataset = rows_of(" cat", prompt="the " * 8)
        assert len(tokenize_dataset(dataset, "x", tokenizer, 8)) == 1
        with pytest.raises(ValueError, match=r"1 of 1 prompts.* to at least 9"):
            tokenize_dataset(dataset, "x", tokenizer, 8, NEEDED)

    def test_long_answers_are_cut_and_reported_and_the_prompt_stays(self, tokenizer, caplog, propagate):
        with caplog.at_level(logging.WARNING):
            rows = tokenize_dataset(rows_of(" sat" * 9, " sat"), "x", tokenizer, 6, NEEDED).to_list()
        assert rows[0] == {"prompt_ids": [THE], "completion_ids": [SAT] * 5, "length": 6}
        assert rows[1]["completion_ids"] == [SAT, EOS]
        assert "1 of 2 answers in `x` are cut at `max_length=6`" in caplog.text


class TestTransforms:
    """Rows come through a transform of the user's own, once; other formats are none of a row's."""

    @pytest.mark.parametrize("num_proc", [None, 2])
    def test_a_transform_is_honoured_once(self, num_proc, tokenizer):
        dataset = rows_of(" cat", " sat").with_transform(
            lambda batch: {**batch, "prompt": [f"red {prompt}" for prompt in batch["prompt"]]}
        )
        rows = tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED, num_proc=num_proc)
        assert rows[0] == {"prompt_ids": [23, THE], "completion_ids": [CAT, EOS], "length": 4}
        assert rows.format["type"] is None

    def test_a_transform_may_make_the_columns(self, tokenizer):
        dataset = Dataset.from_dict({"question": ["the"], "answer": [" cat"]}).with_transform(
            lambda batch: {"prompt": batch["question"], "completion": batch["answer"]}
        )
        rows = tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)
        assert rows.to_list() == [{"prompt_ids": [THE], "completion_ids": [CAT, EOS], "length": 3}]
        primed = tokenize_primed_dataset(dataset, "x", tokenizer, PrimingTemplate("red "), answers_needed=NEEDED)
        assert primed["teacher_prompt_ids"][:] == [[23, THE]]

    def test_another_transform_is_another_preparation(self, tokenizer, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"prompt": "the"}')
        dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        for word, id_ in (("red", 23), ("blue", 24)):
            dataset = dataset.with_transform(
                lambda batch, word=word: {"prompt": [f"{word} {p}" for p in batch["prompt"]]}
            )
            assert tokenize_dataset(dataset, "x", tokenizer, 64)["prompt_ids"][:] == [[id_, THE]]

    def test_the_transform_that_trl_documents(self, tokenizer):
        messages = [{**CHAT[0], "name": None}, CHAT[1]]
        dataset = Dataset.from_list([{"messages": messages, "tools": None}]).with_transform(remove_none_values)
        assert tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)[0]["completion_ids"] == [SAT, ON, EOS]

    @pytest.mark.parametrize("streams", [False, True])
    @pytest.mark.parametrize("form", ["torch", "numpy"])
    @pytest.mark.parametrize(
        "row", [{"messages": CHAT}, {"prompt_ids": [2, 12, 13, 3], "completion_ids": [15, 16, 0]}]
    )
    def test_other_formats_give_lists(self, streams, form, row, tokenizer):
        dataset = Dataset.from_list([row])
        dataset = (dataset.to_iterable_dataset() if streams else dataset).with_format(form)
        (found,) = tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)
        assert found == {"prompt_ids": [USER, THE, CAT, ASSISTANT], "completion_ids": [SAT, ON, EOS], "length": 7}
        assert type(found["prompt_ids"]) is list


class TestAnswers:
    """Which answers are missing, empty or not used."""

    def test_missing_ones_are_counted_if_answers_are_needed(self, tokenizer):
        dataset = rows_of(" cat", None)
        assert len(tokenize_dataset(dataset, "x", tokenizer, 8)) == 2
        with pytest.raises(ValueError, match="1 of 2 rows in `x` have no answer"):
            tokenize_dataset(dataset, "x", tokenizer, 8, NEEDED)
        with pytest.raises(ValueError, match="A row in `x` has no answer"):
            list(tokenize_dataset(dataset.to_iterable_dataset(), "x", tokenizer, 8, NEEDED))

    def test_empty_ones_are_counted(self, tokenizer, caplog, propagate):
        dataset = rows_of(" cat", "", " \n", "<eos>", " sat")
        with caplog.at_level(logging.WARNING):
            ids = tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)["completion_ids"][:]
            tokenize_primed_dataset(dataset, "x", tokenizer, PrimingTemplate("red "), answers_needed=NEEDED)
            tokenize_dataset(dataset.select([1, 2]), "eval", tokenizer, 64)
        assert ids == [[CAT, EOS], [EOS], [EOS], [EOS], [SAT, EOS]]
        found = "3 of 5 answers in `x` are empty: the student learns to stop at once. Filter them out"
        assert caplog.text.count(found) == 2
        assert "2 of 2 answers in `eval` are empty: only their end of text is compared" in caplog.text
        stream = tokenize_dataset(dataset.to_iterable_dataset(), "x", tokenizer, 64, NEEDED)
        assert [row["completion_ids"] for row in stream] == ids

    def test_a_templates_own_wrapper_is_no_answer(self, tokenizer, caplog, propagate):
        tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "a <eos>\n")
        dataset = Dataset.from_list([{"messages": [CHAT[0], {**CHAT[1], "content": c}]} for c in ("", "cat")])
        with caplog.at_level(logging.WARNING):
            rows = tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)
        assert "1 of 2 answers in `x` are empty" in caplog.text
        assert rows[0]["completion_ids"][-1] == EOS

    @pytest.mark.parametrize(
        "dataset", [rows_of("", " "), Dataset.from_list([{"prompt_ids": [THE], "completion_ids": [EOS]}] * 2)]
    )
    def test_only_empty_ones_are_refused(self, dataset, tokenizer):
        with pytest.raises(ValueError, match=r"2 of 2 answers in `x` are empty.*`lmbda` is below 1"):
            tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)
        with pytest.raises(ValueError, match="2 of 2 answers in `x` are empty"):
            tokenize_primed_dataset(dataset, "x", tokenizer, None, answers_needed=NEEDED)

    def test_answers_may_begin_late(self, tokenizer):
        """The type of a column is not guessed from its first thousand rows."""
        dataset = rows_of(*[None] * 1100, " cat")
        assert tokenize_dataset(dataset, "x", tokenizer, 64)[1100]["completion_ids"] == [CAT, EOS]

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": CHAT[:1], "completion": [{"role": "user", "content": "cat"}]},
            {"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": None}]},
            {"prompt": CHAT[:1], "completion": []},
            {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
            {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"function": "a"}]}]},
            {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "image", "text": None}]}]},
        ],
    )
    def test_unused_ones_are_not_looked_at(self, row, tokenizer):
        dataset = Dataset.from_list([row], on_mixed_types="use_json")
        ids = [USER, THE, CAT, ASSISTANT]
        for given in (dataset, dataset.to_iterable_dataset()):
            found = tokenize_dataset(given, "x", tokenizer, 64, with_answers=False)
            assert list(found) == [{"prompt_ids": ids, "completion_ids": [], "length": 4}]
            (primed,) = tokenize_primed_dataset(given, "x", tokenizer, PrimingTemplate("red "))
            assert (primed["prompt_ids"], primed["completion_ids"]) == (ids, [])
        with pytest.raises(ValueError, match="Row 0 of `x`"):
            tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)

    def test_unused_ids_are_not_looked_at(self, tokenizer):
        dataset = Dataset.from_list([{"prompt_ids": [THE], "completion_ids": [999]}])
        assert tokenize_dataset(dataset, "x", tokenizer, 64, with_answers=False)[0]["completion_ids"] == []

    def test_a_prompt_alone_needs_an_answer_after_its_messages_all_the_same(self, tokenizer):
        with pytest.raises(ValueError, match="must end with an assistant message"):
            tokenize_dataset(Dataset.from_list([{"messages": CHAT[:1]}]), "x", tokenizer, 64, with_answers=False)

    def test_a_rewritten_prompt_counts_as_one_without_an_answer_in_evaluation(self, tokenizer, caplog, propagate):
        tokenizer.chat_template += "{% if add_generation_prompt %}red{% endif %}"  # as one that opens thoughts
        dataset = Dataset.from_list([{"messages": CHAT}] * 2)
        expected = [{"prompt_ids": [USER, THE, CAT, ASSISTANT, 23], "completion_ids": [], "length": 5}] * 2
        with caplog.at_level(logging.WARNING):
            assert tokenize_dataset(dataset, "x", tokenizer, 64).to_list() == expected
        found = "2 of 2 rows in `x` count as rows without an answer: the chat template writes their prompt"
        assert caplog.text.count(found) == 1
        assert list(tokenize_dataset(dataset.to_iterable_dataset(), "x", tokenizer, 64)) == expected
        with pytest.raises(ValueError, match="Row 0 of `x`: The chat template writes a prompt differently"):
            tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)
        assert tokenize_dataset(dataset, "x", tokenizer, 64, with_answers=False).to_list() == expected
        assert tokenize_primed_dataset(dataset, "x", tokenizer, None)["completion_ids"][:] == [[], []]
