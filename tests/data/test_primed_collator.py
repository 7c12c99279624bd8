import copy
import json
import logging

import pytest
import torch
from datasets import Dataset, load_dataset
from tiny import answered_dataset, chat_dataset, tiny_tokenizer

from trl_promptkd import DataCollatorForPrimedDistillation, PrimingTemplate
from trl_promptkd.data import tokenize_primed_row
from trl_promptkd.data.primed import pad_views, prompts_of_views, tokenize_primed_dataset


# Ids of the test vocabulary (tiny.py)
EOS, USER, ASSISTANT = 0, 2, 3
THE, CAT, SAT, ON, MAT, RED, BLUE = 12, 13, 15, 16, 17, 23, 24
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]
NEEDED = "`response_source` is 'dataset'."


class TestTokenizePrimedRow:
    @pytest.mark.parametrize(
        ("row", "template", "student", "teacher", "completion"),
        [
            ({"messages": CHAT}, PrimingTemplate("red "), [2, THE, CAT, 3], [2, RED, THE, CAT, 3], [SAT, ON, EOS]),
            ({"messages": CHAT}, None, [2, THE, CAT, 3], [2, THE, CAT, 3], [SAT, ON, EOS]),
            ({"prompt": CHAT[:1]}, PrimingTemplate("red "), [2, THE, CAT, 3], [2, RED, THE, CAT, 3], []),
            (
                {"prompt": "the cat", "completion": " sat on"},
                PrimingTemplate(" red", "suffix"),
                [THE, CAT],
                [THE, CAT, RED],
                [SAT, ON, EOS],
            ),
        ],
    )
    def test_only_the_teachers_prompt_is_primed(self, row, template, student, teacher, completion, tokenizer):
        assert tokenize_primed_row(row, tokenizer, template) == {
            "prompt_ids": student,
            "teacher_prompt_ids": teacher,
            "completion_ids": completion,
        }

    @pytest.mark.parametrize(
        ("placement", "index", "content"),
        [
            ("prefix", 3, "red blue the dog"),
            ("suffix", 3, "the dog red blue "),
            ("system", 0, "you are a student\n\nred blue "),
        ],
    )
    def test_the_teachers_view_is_the_chat_template_of_the_primed_conversation(
        self, placement, index, content, tokenizer
    ):
        texts = {"system": "you are a student", "user": "the cat", "assistant": "sat on"}
        turns = [{"role": role, "content": text} for role, text in texts.items()]
        turns += [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "on mat"}]
        primed = copy.deepcopy(turns)
        primed[index]["content"] = content
        template = PrimingTemplate((" " if placement == "suffix" else "") + "{{ color }} blue ", placement)
        rows = [{"messages": turns, "color": "red"}, {"messages": CHAT, "color": "red"}]
        batch = DataCollatorForPrimedDistillation(tokenizer, template)(rows)
        for view, conversation in (("", turns), ("teacher_", primed)):
            ids = batch[f"{view}input_ids"][0][batch[f"{view}attention_mask"][0].bool()]
            assert ids.tolist() == tokenizer.apply_chat_template(conversation, return_dict=False)

    def test_tools_reach_both_views(self, tokenizer):
        tokenizer.chat_template = "{% if tools %}red {{ tools[0]['name'] }} {% endif %}" + tokenizer.chat_template
        row = {"messages": CHAT, "tools": '[{"name": "mat"}]'}
        ids = tokenize_primed_row(row, tokenizer, PrimingTemplate("blue "))
        assert ids["prompt_ids"] == [RED, MAT, USER, THE, CAT, ASSISTANT]
        assert ids["teacher_prompt_ids"] == [RED, MAT, USER, BLUE, THE, CAT, ASSISTANT]

    def test_tokenized_rows(self, tokenizer):
        row = {"prompt_ids": [5], "teacher_prompt_ids": [6, 5], "completion_ids": [7]}
        assert tokenize_primed_row(row, tokenizer, PrimingTemplate("red ")) == row
        with pytest.raises(ValueError, match="no `teacher_prompt_ids`"):
            tokenize_primed_row({"prompt_ids": [5], "completion_ids": [7]}, tokenizer, PrimingTemplate("red "))
        ids = tokenize_primed_row({"prompt_ids": [5], "completion_ids": [7]}, tokenizer, None)
        assert ids["teacher_prompt_ids"] == [5]


class TestCollator:
    ROWS = [
        {"prompt_ids": [5], "teacher_prompt_ids": [8, 9, 5], "completion_ids": [6, 0]},
        {"prompt_ids": [5, 6, 7], "teacher_prompt_ids": [8, 5, 6, 7], "completion_ids": [0]},
    ]

    def test_values(self, tokenizer):
        batch = DataCollatorForPrimedDistillation(tokenizer)(self.ROWS)
        expected = {
            "input_ids": [[0, 0, 5, 6, 0], [5, 6, 7, 0, 0]],
            "attention_mask": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]],
            "labels": [[-100, -100, -100, 6, 0], [-100, -100, -100, 0, -100]],
            "teacher_input_ids": [[0, 8, 9, 5, 6, 0], [8, 5, 6, 7, 0, 0]],
            "teacher_attention_mask": [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]],
            "teacher_labels": [[-100, -100, -100, -100, 6, 0], [-100, -100, -100, -100, 0, -100]],
        }
        assert {name: value.tolist() for name, value in batch.items()} == expected

    def test_labels_select_the_same_ids_in_the_same_order(self):
        """Also the end of text where it is the pad token, and where it is not (trap 9)."""
        for pad_is_eos in (True, False):
            tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
            rows = [*chat_dataset(5), *answered_dataset(5)]
            batch = DataCollatorForPrimedDistillation(tokenizer, "teacher")(rows)
            student = batch["input_ids"][batch["labels"] != -100]
            teacher = batch["teacher_input_ids"][batch["teacher_labels"] != -100]
            assert torch.equal(student, teacher)
            assert (student == tokenizer.eos_token_id).sum() == 10
            assert batch["teacher_input_ids"].size(1) > batch["input_ids"].size(1)

    def test_pad_to_multiple_of(self, tokenizer):
        batch = DataCollatorForPrimedDistillation(tokenizer, pad_to_multiple_of=8)(self.ROWS)
        assert batch["input_ids"].shape == batch["teacher_labels"].shape == (2, 8)
        plain = DataCollatorForPrimedDistillation(tokenizer)(self.ROWS)
        assert batch["teacher_attention_mask"].sum() == plain["teacher_attention_mask"].sum()

    def test_prompts_come_back(self):
        batch = pad_views([[5], [5, 6]], [[8, 5], [8, 5, 6]], [[6, 0], [0]], pad_token_id=0)
        assert prompts_of_views(batch) == ([[5], [5, 6]], [[8, 5], [8, 5, 6]])


def prepare(dataset, template=None, answers_needed=NEEDED, **settings):
    return tokenize_primed_dataset(dataset, "x", tiny_tokenizer(), template, answers_needed=answers_needed, **settings)


class TestTokenizePrimedDataset:
    @pytest.mark.parametrize("dataset", [chat_dataset(4), answered_dataset(4)])
    def test_columns(self, dataset):
        got = prepare(dataset, PrimingTemplate("red "))
        assert got.to_list() == list(prepare(dataset.to_iterable_dataset(), PrimingTemplate("red ")))
        assert set(got.column_names) == {"prompt_ids", "teacher_prompt_ids", "completion_ids", "length"}
        assert got[0]["length"] == len(got[0]["teacher_prompt_ids"]) + len(got[0]["completion_ids"])

    def test_several_processes_make_the_same(self):
        template = PrimingTemplate("red {{ prompt }} ")
        one, two = (prepare(answered_dataset(6), template, num_proc=number) for number in (None, 2))
        assert one.to_list() == two.to_list()

    def test_is_prepared_once_and_cached(self, tmp_path):
        """A changed priming text is another preparation."""
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in answered_dataset(4)))
        dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        files = [
            prepare(dataset, PrimingTemplate(text)).cache_files[0]["filename"] for text in ("red ", "red ", "blue ")
        ]
        assert files[0] == files[1] != files[2]

    def test_rows_that_are_too_long_are_counted_and_left_out(self, caplog, propagate):
        dataset, template = answered_dataset(8), PrimingTemplate("red blue ")
        lengths = [(len(r["prompt_ids"]) + len(r["completion_ids"]), r["length"]) for r in prepare(dataset, template)]
        with caplog.at_level(logging.WARNING, logger="trl_promptkd"):
            kept = prepare(dataset, template, max_length=8, teacher_max_length=9)
        student_long = sum(student > 8 for student, _ in lengths)
        teacher_long = sum(student <= 8 and teacher > 9 for student, teacher in lengths)
        assert student_long
        assert teacher_long
        assert len(kept) == 8 - student_long - teacher_long
        assert f"{student_long} of 8 rows in `x` do not fit into `max_length=8`" in caplog.text
        assert f"{teacher_long} of {8 - student_long} rows, as the teacher sees them, in `x`" in caplog.text
        assert all(row["completion_ids"][-1] == EOS for row in kept)  # nothing is cut

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_length": 6}, r"rows in `x` do not fit into `max_length=6`.*`max_length` to at least \d+"),
            ({"teacher_max_length": 6}, r"teacher sees them.*`teacher_max_length=6`.*`teacher_max_length` to at"),
            ({"max_length": 1, "overlong": "drop"}, "so that no row remains"),
        ],
    )
    def test_or_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            prepare(answered_dataset(8), **{"overlong": "error", **settings})

    def test_answers_that_are_not_trained_on_do_not_count(self):
        rows = prepare(answered_dataset(4), answers_needed=None, max_length=5, overlong="error")
        assert all(row["completion_ids"] == [] for row in rows)

    def test_tokenized_rows_are_taken_as_they_are(self):
        rows = [{"prompt_ids": [5], "teacher_prompt_ids": [6, 5], "completion_ids": [7]}]
        got = prepare(Dataset.from_list(rows), PrimingTemplate("{{ gold }}"))
        assert got.to_list() == [{**rows[0], "length": 3}]
