"""What a server is sent for a row, and the row's token ids once it has answered."""

import json

import pytest
from datasets import Dataset
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from trl_promptkd import PrimingTemplate
from trl_promptkd.data.answered_rows import add_answers, requests_of
from trl_promptkd.data.primed import tokenize_primed_dataset
from trl_promptkd.data.tokenize import tokenize_cut_row, tokenize_row


USER = {"role": "user", "content": "the cat"}
ANSWER = {"role": "assistant", "content": "sat on"}
RED = PrimingTemplate("red ")


def rows(*rows, priming=RED, tokenizer=None):
    return tokenize_primed_dataset(
        Dataset.from_list(list(rows)), "x", tokenizer or tiny_tokenizer(), priming, server_answers=True
    )


def sent(row, priming=RED):
    return requests_of(rows(row, priming=priming))[0]


class TestRequests:
    def test_a_text_is_sent_with_the_priming_text(self):
        assert sent({"prompt": "the cat"}) == {"prompt": "red the cat"}
        assert sent({"prompt": "the cat"}, PrimingTemplate(" red", "suffix")) == {"prompt": "the cat red"}
        assert sent({"prompt": "the cat"}, None) == {"prompt": "the cat"}

    @pytest.mark.parametrize(
        ("placement", "messages"),
        [
            ("prefix", [{"role": "user", "content": "red the cat"}]),
            ("suffix", [{"role": "user", "content": "the catred "}]),
            ("system", [{"role": "system", "content": "red "}, USER]),
        ],
    )
    @pytest.mark.parametrize("row", [{"messages": [USER, ANSWER]}, {"prompt": [USER]}])
    def test_a_conversation_is_sent_as_messages_before_any_template(self, row, placement, messages):
        assert sent(row, PrimingTemplate("red ", placement)) == {"messages": messages}

    def test_contents_in_parts_become_one_text_and_nothing_is_filled_in(self):
        parts = {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}
        with_name = {"role": "user", "content": "the", "name": "dog"}
        dataset = rows({"prompt": [parts]}, priming=None)
        assert requests_of(dataset) == [{"messages": [USER]}]
        assert sent({"prompt": [USER, ANSWER, with_name]}, None) == {"messages": [USER, ANSWER, with_name]}

    def test_columns_are_variables_of_the_priming_text(self):
        template = PrimingTemplate("{{ color }} {{ reference_answer }} ")
        assert sent({"messages": [USER, ANSWER], "color": "blue"}, template)["messages"][0]["content"] == (
            "blue sat on the cat"
        )

    def test_arguments_of_the_chat_template_are_sent_too(self):
        kwargs = [{"enable_thinking": False}, {"effort": "low"}, None]  # Arrow fills in what a row does not have
        dataset = rows(*({"prompt": [USER], "chat_template_kwargs": more} for more in kwargs), priming=None)
        assert [request.get("chat_template_kwargs") for request in requests_of(dataset)] == kwargs

    def test_the_students_template_need_not_know_what_is_sent(self):
        """A system message is the teacher's alone; the student's template may have no such role."""
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            + CHAT_TEMPLATE
        )
        dataset = rows({"prompt": [USER]}, priming=PrimingTemplate("red", "system"), tokenizer=tokenizer)
        assert requests_of(dataset)[0]["messages"][0] == {"role": "system", "content": "red"}
        assert dataset[0]["prompt_ids"] == dataset[0]["teacher_prompt_ids"] == [2, 12, 13, 3]

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"prompt_ids": [3], "teacher_prompt_ids": [3]}, "hold `prompt_ids`, but a server is sent texts"),
            ({"prompt": [USER], "tools": [{"name": "f"}]}, "has `tools`, but only answers that are texts"),
            ({"prompt": [USER, ANSWER]}, "ends with an assistant message, but a server"),
            ({"messages": [USER, ANSWER, ANSWER]}, "ends with an assistant message, but a server"),
        ],
    )
    def test_what_cannot_be_sent_is_refused(self, row, says):
        with pytest.raises(ValueError, match=f"Row 0 of `x`: .*{says}"):
            rows(row, priming=None)

    @pytest.mark.parametrize(
        ("template", "says"),
        [
            ("{{ messages | length }}" + CHAT_TEMPLATE, "differently once an answer follows it.*server"),
            ("{% for m in messages %}<user> {% endfor %}", "writes nothing of the answer"),
        ],
    )
    def test_a_template_that_cannot_write_answers_is_refused_before_any_is_asked_for(self, template, says):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"Row 0 of `x`: .*{says}"):
            rows({"prompt": [USER]}, tokenizer=tokenizer)


class TestAnswers:
    def test_are_tokenized_as_a_data_sets_are(self):
        for row in ({"prompt": [USER]}, {"prompt": "the cat"}):
            answer = " sat on"
            (answered,) = add_answers(rows(row), "x", [(answer, False)], tiny_tokenizer())
            expected = tokenize_row({**row, "completion": answer}, tiny_tokenizer())
            assert expected["completion_ids"] == [15, 16, 0]
            assert answered == {
                **expected,
                "teacher_prompt_ids": expected["prompt_ids"],
                "length": len(expected["prompt_ids"]) + 3,
            }

    def test_one_that_was_cut_has_no_end_of_text(self):
        for row in ({"prompt": [USER]}, {"prompt": "the cat"}):
            (answered,) = add_answers(rows(row), "x", [(" sat on", True)], tiny_tokenizer())
            assert answered["completion_ids"] == [15, 16]

    def test_the_order_of_rows_stays(self):
        dataset = rows({"prompt": "the cat"}, {"prompt": "the"}, {"prompt": "on"})
        answered = add_answers(dataset, "x", [(" sat", False), (" on", True), (" red", False)], tiny_tokenizer())
        assert answered["completion_ids"][:] == [[15, 0], [16], [23, 0]]

    def test_empty_ones_are_counted(self, caplog, propagate):
        dataset = rows({"prompt": [USER]}, {"prompt": [USER]}, {"prompt": [USER]})
        answered = add_answers(dataset, "x", [("", False), (" ", True), ("sat", False)], tiny_tokenizer())
        assert answered["completion_ids"][:] == [[0], [], [15, 0]]
        assert "2 of 3 answers that the server wrote for `x` are empty" in caplog.text
        assert "the student learns to stop at once" in caplog.text

    def test_are_refused_if_all_are_empty(self):
        with pytest.raises(ValueError, match=r"1 of 1 answers that the server wrote.*are empty.*max_new_tokens"):
            add_answers(rows({"prompt": [USER]}), "x", [("\n", True)], tiny_tokenizer())


class TestCutAnswers:
    def test_end_where_the_template_writes_their_last_word(self):
        """Whatever it writes after an answer, and before one."""
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}red {{ m['content'] | trim }}"
            " <system> blue <eos>{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<assistant> {% endif %}"
        )
        row = {"prompt": [USER], "completion": "sat <eos> sat "}
        assert tokenize_row(row, tokenizer)["completion_ids"][-3:] == [4, 24, 0]
        assert tokenize_cut_row(row, tokenizer) == {"prompt_ids": [2, 12, 13, 3], "completion_ids": [23, 15, 0, 15]}

    def test_thoughts_that_the_template_moves_stay(self):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{% if '/' in m['content'] %}red {{ m['content'].split('/')[0] }} blue "
            "{{ m['content'].split('/')[1] }} <eos>{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
        )
        row = {"prompt": [USER], "completion": "sat / on"}
        assert tokenize_row(row, tokenizer)["completion_ids"] == [23, 15, 24, 16, 0]
        assert tokenize_cut_row(row, tokenizer)["completion_ids"] == [23, 15, 24, 16]


def test_the_column_is_json():
    (texts,) = rows({"prompt": "the cat ü"})["texts_json"]
    assert json.loads(texts) == {"prompt": "the cat ü", "request": {"prompt": "red the cat ü"}}
