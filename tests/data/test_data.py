import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from tiny import answered_dataset, chat_dataset, prompt_dataset, tiny_tokenizer
from trl.trainer.utils import remove_none_values

from trl_promptkd import PrimingTemplate
from trl_promptkd.data import (
    DataCollatorForPromptCompletion,
    check_columns,
    grouped_by_length,
    name_columns,
    pad_rows,
    tokenize_dataset,
    tokenize_row,
)
from trl_promptkd.data.primed import tokenize_primed_dataset
from trl_promptkd.data.rows import check_ids
from trl_promptkd.data.tokenize import _without_blank_tail


CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]
THE, CAT, SAT, ON, MAT = 12, 13, 15, 16, 17
USER, ASSISTANT, EOS = 2, 3, 0
NEEDED = "`lmbda` is below 1."


class TestTokenizeRow:
    def test_ids_are_those_of_the_test_vocabulary(self, tokenizer):
        assert tokenizer("the cat sat on mat")["input_ids"] == [THE, CAT, SAT, ON, MAT]

    def test_messages_are_split_before_the_answer(self, tokenizer):
        row = tokenize_row({"messages": CHAT}, tokenizer)
        assert row == {"prompt_ids": [USER, THE, CAT, ASSISTANT], "completion_ids": [SAT, ON, EOS]}

    def test_prompt_and_completion_as_conversations(self, tokenizer):
        row = tokenize_row({"prompt": CHAT[:1], "completion": CHAT[1:]}, tokenizer)
        assert row == tokenize_row({"messages": CHAT}, tokenizer)

    def test_texts_get_an_end_of_text_token(self, tokenizer):
        row = tokenize_row({"prompt": "the cat", "completion": " sat on"}, tokenizer)
        assert row == {"prompt_ids": [THE, CAT], "completion_ids": [SAT, ON, EOS]}

    def test_prompt_alone_has_no_completion(self, tokenizer):
        assert tokenize_row({"prompt": "the cat"}, tokenizer) == {"prompt_ids": [THE, CAT], "completion_ids": []}
        assert tokenize_row({"prompt": CHAT[:1]}, tokenizer)["prompt_ids"] == [USER, THE, CAT, ASSISTANT]

    def test_tokens_that_would_merge_over_the_border_are_kept_apart(self, tokenizer):
        row = tokenize_row({"prompt": "the cat", "completion": "sat on"}, tokenizer)  # "catsat" is one unknown word
        assert row == {"prompt_ids": [THE, CAT], "completion_ids": [SAT, ON, EOS]}

    def test_what_the_template_writes_after_the_end_is_dropped(self, tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<eos> . ")
        assert tokenize_row({"messages": CHAT}, tokenizer)["completion_ids"] == [SAT, ON, EOS]

    def test_white_space_after_a_turns_own_end_token_is_dropped(self):
        special = SimpleNamespace(special=True)
        gemma = SimpleNamespace(
            added_tokens_decoder={7: special}, decode=lambda ids: "".join(" x"[i % 2] for i in ids)
        )
        assert _without_blank_tail([1, 7, 4], gemma) == [1, 7]  # 4 is a line break
        assert _without_blank_tail([1, 7, 3], gemma) == [1, 7, 3]  # 3 is text
        assert _without_blank_tail([1, 4], gemma) == [1, 4]

    def test_tools_may_be_json(self, tokenizer):
        tokenizer.chat_template = "{% if tools %}red {{ tools[0]['name'] }} {% endif %}" + tokenizer.chat_template
        row = {"messages": CHAT, "tools": '[{"name": "cat"}]'}
        assert tokenize_row(row, tokenizer)["prompt_ids"][1:] == [CAT, USER, THE, CAT, ASSISTANT]
        assert tokenize_row({"messages": CHAT, "tools": []}, tokenizer)["prompt_ids"] == [USER, THE, CAT, ASSISTANT]

    def test_tokenized_rows_are_taken_as_they_are(self, tokenizer):
        row = {"prompt_ids": [5], "completion_ids": [6, 7]}
        assert tokenize_row(row, tokenizer) == row

    def test_a_template_that_rewrites_the_prompt_is_refused(self, tokenizer):
        tokenizer.chat_template = "{% if messages|length > 1 %}<system> {% endif %}" + tokenizer.chat_template
        with pytest.raises(ValueError, match="writes a prompt differently once an answer follows"):
            tokenize_row({"messages": CHAT}, tokenizer)

    def test_messages_without_an_answer_are_refused(self, tokenizer):
        with pytest.raises(ValueError, match="must end with an assistant message"):
            tokenize_row({"messages": CHAT[:1]}, tokenizer)

    def test_a_message_may_call_a_tool_instead_of_saying_something(self, tokenizer):
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "cat", "arguments": {}}}]}
        assert tokenize_row({"prompt": [CHAT[0], call, CHAT[0]]}, tokenizer)["prompt_ids"]
        with pytest.raises(ValueError, match="it must have a role and a content"):
            tokenize_row({"prompt": [CHAT[0], {**call, "tool_calls": None}, CHAT[0]]}, tokenizer)

    def test_rows_may_have_a_format(self, tokenizer):
        dataset = Dataset.from_list([{"prompt_ids": [7, 8], "completion_ids": [9]}]).with_format("torch")
        assert tokenize_dataset(dataset, "x", tokenizer, None)[0] == {
            "prompt_ids": [7, 8],
            "completion_ids": [9],
            "length": 3,
        }

    def test_ids_may_have_gaps(self, tokenizer):
        tokenizer.get_vocab = lambda: {"a": 5, "b": 500}
        check_ids("prompt_ids", [5, 500], tokenizer)
        with pytest.raises(ValueError, match="`prompt_ids` hold the id 499"):
            check_ids("prompt_ids", [5, 499], tokenizer)

    def test_a_row_without_a_prompt_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="neither a prompt nor messages"):
            tokenize_row({"prompt": None, "completion": "x"}, tokenizer)

    def test_conversations_need_a_template(self, tokenizer):
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match="no chat template"):
            tokenize_row({"messages": CHAT}, tokenizer)


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


class TestNameColumns:
    def test_columns_become_a_conversation_and_the_others_stay(self):
        dataset = Dataset.from_dict({"question": ["the cat"], "answer": ["sat"], "topic": ["mat"]})
        assert name_columns(dataset, "question", "answer", conversational=True).to_list() == [
            {
                "prompt": [{"role": "user", "content": "the cat"}],
                "completion": [{"role": "assistant", "content": "sat"}],
                "topic": "mat",
            }
        ]
        assert name_columns(Dataset.from_dict({"prompt": ["a"]}), "prompt")["prompt"][:] == ["a"]
        with pytest.raises(
            ValueError, match=r"`prompt_column` is 'quest'; the columns are \['answer', 'question', 'topic'\]"
        ):
            name_columns(dataset, "quest")


class TestTokenizeDataset:
    @pytest.mark.parametrize("make", [answered_dataset, chat_dataset])
    def test_columns_are_replaced(self, make, tokenizer):
        dataset = tokenize_dataset(make(4), "train_dataset", tokenizer, 64, NEEDED)
        assert sorted(dataset.column_names) == ["completion_ids", "length", "prompt_ids"]
        assert all(ids[-1] == EOS for ids in dataset["completion_ids"])

    def test_streamed_rows_come_out_the_same(self, tokenizer):
        whole = tokenize_dataset(answered_dataset(4), "train_dataset", tokenizer, 64, NEEDED)
        streamed = tokenize_dataset(answered_dataset(4).to_iterable_dataset(), "train_dataset", tokenizer, 64, NEEDED)
        assert isinstance(streamed, IterableDataset)
        assert list(streamed) == whole.to_list()

    def test_long_prompts_are_counted_and_refused(self, tokenizer):
        dataset = Dataset.from_list([{"prompt": "the " * n} for n in (3, 9, 12)])
        with pytest.raises(
            ValueError, match=r"2 of 3 prompts in `train_dataset` do not fit into `max_length=8`. .* at least 12"
        ):
            tokenize_dataset(dataset, "train_dataset", tokenizer, 8)
        with pytest.raises(ValueError, match="One of the prompts does not fit"):
            list(tokenize_dataset(dataset.to_iterable_dataset(), "train_dataset", tokenizer, 8))

    def test_long_prompts_are_left_out_and_counted_on_request(self, tokenizer, caplog, propagate):
        dataset = Dataset.from_list([{"prompt": "the " * n} for n in (3, 9, 12)])
        with caplog.at_level(logging.WARNING):
            rows = tokenize_dataset(dataset, "train_dataset", tokenizer, 8, overlong="drop")
            streamed = list(tokenize_dataset(dataset.to_iterable_dataset(), "x", tokenizer, 8, overlong="drop"))
        assert rows.to_list() == streamed == [{"prompt_ids": [THE] * 3, "completion_ids": [], "length": 3}]
        assert "2 of 3 prompts in `train_dataset`" in caplog.text
        assert "They are left out" in caplog.text
        with pytest.raises(ValueError, match=r"no row remains. Set `max_length` to at least 12"):
            tokenize_dataset(dataset, "x", tokenizer, 2, overlong="drop")

    def test_rows_without_an_answer_are_counted_where_answers_are_needed(self, tokenizer):
        dataset = Dataset.from_list([{"prompt": "the", "completion": " cat"}, {"prompt": "the", "completion": None}])
        assert len(tokenize_dataset(dataset, "x", tokenizer, 8)) == 2
        with pytest.raises(ValueError, match="1 of 2 rows in `x` have no answer"):
            tokenize_dataset(dataset, "x", tokenizer, 8, NEEDED)
        with pytest.raises(ValueError, match="A row in `x` has no answer"):
            list(tokenize_dataset(dataset.to_iterable_dataset(), "x", tokenizer, 8, NEEDED))

    def test_a_prompt_may_fill_max_length_where_no_answer_follows_it(self, tokenizer):
        dataset = Dataset.from_list([{"prompt": "the " * 8, "completion": " cat"}])
        assert len(tokenize_dataset(dataset, "x", tokenizer, 8)) == 1
        with pytest.raises(ValueError, match="1 of 1 prompts"):
            tokenize_dataset(dataset, "x", tokenizer, 8, NEEDED)

    def test_long_answers_are_cut_and_reported_and_the_prompt_stays(self, tokenizer, caplog, propagate):
        dataset = Dataset.from_list(
            [{"prompt": "the cat", "completion": " sat" * 9}, {"prompt": "the", "completion": " sat"}]
        )
        with caplog.at_level(logging.WARNING):
            rows = tokenize_dataset(dataset, "train_dataset", tokenizer, 6, NEEDED).to_list()
        assert rows[0] == {"prompt_ids": [THE, CAT], "completion_ids": [SAT] * 4, "length": 6}
        assert rows[1]["completion_ids"] == [SAT, EOS]
        assert "1 of 2 answers in `train_dataset` are cut at `max_length=6`" in caplog.text


class TestTransforms:
    """Rows come through a transform of the user's own, once; other formats are none of a row's."""

    ROWS = ({"prompt": "the", "completion": " cat"}, {"prompt": "the dog", "completion": " sat"})

    @staticmethod
    def shout(batch):
        return {**batch, "prompt": [f"red {prompt}" for prompt in batch["prompt"]]}

    @pytest.mark.parametrize("num_proc", [None, 2])
    def test_a_transform_is_honoured_once(self, num_proc, tokenizer):
        dataset = Dataset.from_list(list(self.ROWS)).with_transform(self.shout)
        rows = tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED, num_proc=num_proc)
        assert rows["prompt_ids"][:] == [[23, THE], [23, THE, 14]]
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

    def test_empty_answers_are_counted(self, tokenizer, caplog, propagate):
        rows = [{"prompt": "the", "completion": text} for text in (" cat", "", " \n", "<eos>", " sat")]
        template = PrimingTemplate("red ")
        with caplog.at_level(logging.WARNING):
            ids = tokenize_dataset(Dataset.from_list(rows), "train_dataset", tokenizer, 64, NEEDED)["completion_ids"]
        assert ids[:] == [[CAT, EOS], [EOS], [EOS], [EOS], [SAT, EOS]]
        found = "3 of 5 answers in `train_dataset` are empty: the student learns to stop at once. Filter them out"
        assert caplog.text.count(found) == 1
        with caplog.at_level(logging.WARNING):
            tokenize_primed_dataset(
                Dataset.from_list(rows), "train_dataset", tokenizer, template, answers_needed=NEEDED
            )
        assert caplog.text.count(found) == 2
        with caplog.at_level(logging.WARNING):
            tokenize_dataset(Dataset.from_list(rows[1:3]), "eval_dataset", tokenizer, 64)
        assert "2 of 2 answers in `eval_dataset` are empty: only their end of text is compared" in caplog.text
        stream = Dataset.from_list(rows).to_iterable_dataset()
        assert [row["completion_ids"] for row in tokenize_dataset(stream, "x", tokenizer, 64, NEEDED)] == ids[:]

    def test_a_templates_own_wrapper_is_no_answer(self, tokenizer, caplog, propagate):
        wrapper = tokenizer.chat_template.replace("<eos>", "a <eos>")
        tokenizer.chat_template = wrapper.replace("<eos>", "<eos>\n")
        dataset = Dataset.from_list(
            [{"messages": [CHAT[0], {"role": "assistant", "content": c}]} for c in ("", "cat")]
        )
        with caplog.at_level(logging.WARNING):
            rows = tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)
        assert "1 of 2 answers in `x` are empty" in caplog.text
        assert rows[0]["completion_ids"][-1] == EOS

    def test_only_empty_answers_are_refused(self, tokenizer):
        rows = [{"prompt": "the", "completion": ""}, {"prompt": "cat", "completion": " "}]
        for dataset in (
            Dataset.from_list(rows),
            Dataset.from_list([{"prompt_ids": [THE], "completion_ids": [EOS]}] * 2),
        ):
            with pytest.raises(ValueError, match=r"2 of 2 answers in `x` are empty.*`lmbda` is below 1"):
                tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)
            with pytest.raises(ValueError, match="2 of 2 answers in `x` are empty"):
                tokenize_primed_dataset(dataset, "x", tokenizer, None, answers_needed=NEEDED)

    def test_answers_may_begin_late(self, tokenizer):
        """The type of a column is not guessed from its first thousand rows."""
        rows = [{"prompt": "the", "completion": None}] * 1100 + [{"prompt": "the", "completion": " cat"}]
        assert tokenize_dataset(Dataset.from_list(rows), "x", tokenizer, 64)[1100]["completion_ids"] == [CAT, EOS]

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": CHAT[:1], "completion": [{"role": "user", "content": "cat"}]},
            {"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": None}]},
            {"prompt": CHAT[:1], "completion": []},
            {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
            {
                "messages": [
                    CHAT[0],
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "a"}}]},
                ]
            },
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "the cat"}]},
                    {"role": "assistant", "content": [{"type": "image", "text": None}]},
                ]
            },
        ],
    )
    def test_unused_answers_are_not_looked_at(self, row, tokenizer):
        (row,) = Dataset.from_list([row])
        ids = [USER, THE, CAT, ASSISTANT]
        for dataset in (Dataset.from_list([row]), Dataset.from_list([row]).to_iterable_dataset()):
            found = tokenize_dataset(dataset, "x", tokenizer, 64, with_answers=False)
            assert list(found) == [{"prompt_ids": ids, "completion_ids": [], "length": 4}]
            (primed,) = tokenize_primed_dataset(dataset, "x", tokenizer, PrimingTemplate("red "))
            assert primed["prompt_ids"] == ids
            assert primed["completion_ids"] == []
        with pytest.raises(ValueError, match="Row 0 of `x`"):
            tokenize_dataset(Dataset.from_list([row]), "x", tokenizer, 64, NEEDED)

    def test_unused_ids_are_not_looked_at(self, tokenizer):
        dataset = Dataset.from_list([{"prompt_ids": [THE], "completion_ids": [999]}])
        assert tokenize_dataset(dataset, "x", tokenizer, 64, with_answers=False)[0]["completion_ids"] == []

    def test_a_prompt_alone_needs_an_answer_after_its_messages_all_the_same(self, tokenizer):
        with pytest.raises(ValueError, match="must end with an assistant message"):
            tokenize_dataset(Dataset.from_list([{"messages": CHAT[:1]}]), "x", tokenizer, 64, with_answers=False)

    def test_a_rewritten_prompt_counts_as_one_without_an_answer_in_evaluation(self, tokenizer, caplog, propagate):
        tokenizer.chat_template += "{% if add_generation_prompt %}red{% endif %}"  # as one that opens thoughts
        dataset = Dataset.from_list([{"messages": CHAT}] * 2)
        with caplog.at_level(logging.WARNING):
            rows = tokenize_dataset(dataset, "eval_dataset", tokenizer, 64)
        expected = {"prompt_ids": [USER, THE, CAT, ASSISTANT, 23], "completion_ids": [], "length": 5}
        assert rows.to_list() == [expected] * 2
        found = "2 of 2 rows in `eval_dataset` count as rows without an answer: the chat template writes their prompt"
        assert caplog.text.count(found) == 1
        assert list(tokenize_dataset(dataset.to_iterable_dataset(), "x", tokenizer, 64)) == [expected] * 2
        with pytest.raises(ValueError, match="Row 0 of `x`: The chat template writes a prompt differently"):
            tokenize_dataset(dataset, "x", tokenizer, 64, NEEDED)
        assert tokenize_dataset(dataset, "x", tokenizer, 64, with_answers=False).to_list() == [expected] * 2
        assert tokenize_primed_dataset(dataset, "x", tokenizer, None)["completion_ids"][:] == [[], []]


class TestCheckColumns:
    def test_an_empty_dataset_is_refused(self):
        with pytest.raises(ValueError, match="`train_dataset` is empty"):
            check_columns(Dataset.from_dict({"prompt": []}), "train_dataset")

    def test_unknown_columns_are_named(self):
        with pytest.raises(
            ValueError, match=r"neither a `messages` nor a `prompt` column; its columns are \['text'\]"
        ):
            check_columns(Dataset.from_dict({"text": ["x"]}), "train_dataset")

    def test_prompts_alone_are_for_on_policy_training(self):
        check_columns(prompt_dataset(2), "train_dataset")
        with pytest.raises(ValueError, match=r"prompts without answers.*`lmbda` is below 1"):
            check_columns(prompt_dataset(2), "train_dataset", NEEDED)


def test_the_tiny_tokenizer_pads_with_its_end_of_text_token():
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS


def test_rows_are_grouped_by_length_longest_first():
    assert grouped_by_length([3, 9, 1, 7, 5], [2, 2, 1]) == [[1, 3], [4, 0], [2]]
