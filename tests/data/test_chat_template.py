"""Conversations: what reaches the chat template, and what is made of what it writes."""

import json

import pytest
from datasets import Dataset, Features, Json, List
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from trl_promptkd import PrimingTemplate
from trl_promptkd.data import RewrittenPromptError, split_row, tokenize_dataset, tokenize_primed_row, tokenize_row
from trl_promptkd.data.chat_template import conversation_texts


USER = {"role": "user", "content": "the cat"}
ANSWER = {"role": "assistant", "content": "sat on"}
PARTS = [{"type": "text", "text": "sat"}, {"type": "text", "text": " on"}]
THE, CAT, SAT, ON, MAT, RED, BLUE, EOS = 12, 13, 15, 16, 17, 23, 24, 0

# Written after the templates of the models they are named after
LLAMA3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
SMOLVLM = (  # takes lists of parts only
    "{% for m in messages %}{{ m['role'] | capitalize }}:{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    " {{ part['text'] }}{% endif %}{% endfor %}<eos>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA3 = (  # takes both
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QWEN3 = (  # forgets earlier thoughts, and writes empty ones before the last answer
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set has = '</think>' in m.content %}"
    "{% set thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thoughts if has }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<eos>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (  # opens thoughts in a prompt, and drops them from answers
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
QWEN_TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}{% for call in m.tool_calls %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ m['content'] + '<eos>' }}{% endfor %}"
)


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def texts(row, template):
    """The prompt's text and the answer's."""
    prompt, completion = split_row(row)
    (text,), answer = conversation_texts([prompt], completion, row, with_template(template))
    return text, answer


def call(name="weather", **arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


class TestContentParts:
    @pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA3, SMOLVLM, GEMMA3, QWEN_TOOLS, QWEN3])
    def test_text_parts_are_joined(self, template):
        question = {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}
        row = {"messages": [question, {"role": "assistant", "content": PARTS}]}
        assert texts(row, template) == texts({"messages": [USER, ANSWER]}, template)
        assert "type" not in "".join(texts(row, template))

    @pytest.mark.parametrize(("content", "answer"), [("sat on", " sat on<eos>"), ("", " <eos>\n")])
    def test_a_template_that_takes_lists_only_gets_lists(self, content, answer):
        row = {"messages": [USER, {**ANSWER, "content": content}]}
        assert texts(row, SMOLVLM) == ("User: the cat<eos>\nAssistant:", answer)

    def test_a_template_that_takes_both_gets_texts(self):
        """Its lists may be written otherwise; here, thoughts are dropped from texts only."""
        template = GEMMA3.replace("m['content'] | trim", "m['content'].split('</think>')[-1] | trim")
        thinking = {"role": "assistant", "content": "<think>hm</think>sat on"}
        assert texts({"messages": [USER, thinking]}, template)[1].rstrip() == "sat on<eos>"

    def test_parts_in_a_data_set_lose_what_arrow_fills_in(self, tokenizer):
        image = {"type": "image", "image": "x.png", "text": None}
        dataset = Dataset.from_list([{"prompt": [{**USER, "content": [part]}]} for part in (PARTS[0], image)])
        assert tokenize_dataset(dataset.select([0]), "x", tokenizer, 64)[0]["prompt_ids"] == [2, SAT, 3]
        message = r"Row 1 of `x`: A row's `prompt` hold a content part of the type 'image'"
        with pytest.raises(ValueError, match=message):
            tokenize_dataset(dataset, "x", tokenizer, 64)

    @pytest.mark.parametrize("kind", ["image", "image_url", "audio", "input_audio", "video"])
    @pytest.mark.parametrize("where", ["prompt", "completion", "messages"])
    @pytest.mark.parametrize("priming", [None, PrimingTemplate("red ")])
    def test_other_parts_are_refused_with_their_type(self, kind, where, priming, tokenizer):
        row = {"prompt": [dict(USER)], "completion": [dict(ANSWER)]}
        row = {"messages": [dict(USER), ANSWER]} if where == "messages" else row
        row[where][0]["content"] = [*PARTS, {"type": kind, kind: "x"}]
        message = f"hold a content part of the type '{kind}', but only parts of the type 'text'"
        with pytest.raises(ValueError, match=message):
            tokenize_primed_row(row, tokenizer, priming)

    @pytest.mark.parametrize("part", ["sat", {"type": "text"}, {"type": "text", "text": 3}, None])
    def test_parts_without_text_are_refused(self, part, tokenizer):
        message = r"hold the content part .* it must be {'type': 'text', 'text': 'a text'}"
        with pytest.raises(ValueError, match=message):
            tokenize_row({"prompt": [{"role": "user", "content": [part]}]}, tokenizer)

    def test_priming_stands_before_the_parts(self, tokenizer):
        row = {"prompt": [{"role": "user", "content": PARTS}], "completion": [ANSWER]}
        ids = tokenize_primed_row(row, tokenizer, PrimingTemplate("red "))
        assert ids["teacher_prompt_ids"] == [2, RED, SAT, ON, 3]

    @pytest.mark.parametrize("column", ["image", "images", "audio", "videos"])
    def test_multimodal_columns_are_refused_unless_empty(self, column, tokenizer):
        row = {"prompt": "the cat", "completion": " sat"}
        for nothing in (None, [], "", [None], {"bytes": None, "path": None}):
            assert tokenize_row({**row, column: nothing}, tokenizer)["completion_ids"] == [SAT, EOS]
        dataset = Dataset.from_list([{**row, column: []}, {**row, column: ["x.png"]}])
        message = f"Row 1 of `y`: A row's `{column}` column is not empty, but multimodal rows are not supported, text"
        with pytest.raises(ValueError, match=message):
            tokenize_dataset(dataset, "y", tokenizer, 64)


class TestPrefill:
    """A prompt that ends with an assistant message is continued."""

    PROMPT = (USER, {"role": "assistant", "content": "the answer is"})

    @pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA3, SMOLVLM, GEMMA3])
    def test_as_transformers_continues_it(self, template):
        prompt = given = list(self.PROMPT)
        if template == SMOLVLM:
            given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in prompt]
        expected = with_template(template).apply_chat_template(given, continue_final_message=True, tokenize=False)
        assert texts({"prompt": prompt}, template) == (expected, None)
        assert expected.endswith("the answer is")

    @pytest.mark.parametrize("template", [LLAMA3, GEMMA3])
    def test_the_answer_goes_on_in_the_same_turn(self, template):
        row = {"prompt": list(self.PROMPT), "completion": [{"role": "assistant", "content": " four"}]}
        prompt, answer = texts(row, template)
        joined = {"role": "assistant", "content": "the answer is four"}
        whole = with_template(template).apply_chat_template([USER, joined], tokenize=False)
        assert prompt + answer == whole.rstrip()
        assert answer == " four<eos>"

    def test_ids(self, tokenizer):
        row = {"prompt": [USER, ANSWER], "completion": [{"role": "assistant", "content": " mat"}]}
        assert tokenize_row({**row, "completion": " mat"}, tokenizer)["completion_ids"] == [MAT, EOS]
        assert tokenize_primed_row(row, tokenizer, PrimingTemplate("red ")) == {
            "prompt_ids": [2, THE, CAT, 3, SAT, ON],
            "teacher_prompt_ids": [2, RED, THE, CAT, 3, SAT, ON],
            "completion_ids": [MAT, EOS],
        }

    def test_two_answers_in_messages_stay_two_turns(self, tokenizer):
        row = {"messages": [USER, ANSWER, {"role": "assistant", "content": "mat"}]}
        expected = {"prompt_ids": [2, THE, CAT, 3, SAT, ON, EOS, 3], "completion_ids": [MAT, EOS]}
        assert tokenize_row(row, tokenizer) == expected
        assert tokenize_row(row, tokenizer, with_answer=False)["prompt_ids"] == expected["prompt_ids"]
        primed = tokenize_primed_row(row, tokenizer, PrimingTemplate("red "))
        assert primed["teacher_prompt_ids"] == [2, RED, THE, CAT, 3, SAT, ON, EOS, 3]

    def test_what_cannot_be_continued_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="ends with an assistant message that calls a tool"):
            tokenize_row({"prompt": [USER, call()]}, tokenizer)
        with pytest.raises(ValueError, match="first message of its `completion` has the role 'user'"):
            tokenize_row({"prompt": [USER, ANSWER], "completion": [USER, ANSWER]}, tokenizer)

    def test_an_empty_continuation_is_an_empty_answer(self, tokenizer):
        row = {"prompt": [USER, ANSWER], "completion": [{"role": "assistant", "content": ""}]}
        assert tokenize_row(row, tokenizer)["completion_ids"] == [EOS]

    def test_a_continuation_that_the_template_drops_is_refused(self):
        first_word = CHAT_TEMPLATE.replace("m['content']", "m['content'].split()[0]")
        row = {"prompt": [USER, {"role": "assistant", "content": "sat"}], "completion": " on"}
        with pytest.raises(ValueError, match="writes nothing of the answer"):
            tokenize_row(row, with_template(first_word))


class TestToolCalls:
    def test_a_template_that_ignores_them_is_refused(self, tokenizer):
        beside_a_text = {**call(city="Rome"), "content": "sat"}
        message = r"ignores `tool_calls`: it writes nothing of the answer's .*'weather'"
        for answer in (call(city="Rome"), beside_a_text):
            for row in ({"messages": [USER, answer]}, {"prompt": [USER], "completion": [answer]}):
                with pytest.raises(ValueError, match=message):
                    tokenize_row(row, tokenizer)

    def test_also_the_second_of_two(self):
        first_only = QWEN_TOOLS.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")
        two = {**call(), "tool_calls": [*call()["tool_calls"], *call("time")["tool_calls"]]}
        with pytest.raises(ValueError, match=r"ignores `tool_calls`.*'time'"):
            texts({"messages": [USER, two]}, first_only)
        assert '"time"' in texts({"messages": [USER, two]}, QWEN_TOOLS)[1]

    def test_a_call_is_trained_on(self):
        prompt, answer = texts({"messages": [USER, call(city="Rome")]}, QWEN_TOOLS)
        assert prompt == "<user>the cat<eos><assistant>"
        assert answer == '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><eos>'

    def test_an_answer_that_the_template_drops_is_refused(self):
        no_answers = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' }}")
        with pytest.raises(ValueError, match=r"writes nothing of the answer .*'sat on'.*only the end of text"):
            tokenize_row({"messages": [USER, ANSWER]}, with_template(no_answers))

    @pytest.mark.parametrize(
        "answer",
        [
            {"role": "assistant", "content": "", "reasoning_content": "hm"},
            {"role": "assistant", "content": None, "function_call": {"name": "weather"}},
        ],
    )
    def test_an_answer_by_another_key_that_the_template_drops_is_refused(self, answer, tokenizer):
        with pytest.raises(ValueError, match=r"writes nothing of the answer .*(reasoning_content|function_call)"):
            tokenize_row({"messages": [USER, answer]}, tokenizer)

    def test_a_message_may_call_a_tool_instead_of_saying_something(self, tokenizer):
        assert tokenize_row({"prompt": [USER, call(), USER]}, tokenizer)["prompt_ids"]
        with pytest.raises(ValueError, match="it must have a role and a content"):
            tokenize_row({"prompt": [USER, {**call(), "tool_calls": None}, USER]}, tokenizer)

    @pytest.mark.parametrize("calls", ["weather()", {"name": "weather"}, ["weather"]])
    def test_what_is_no_list_of_calls_is_refused(self, calls, tokenizer):
        with pytest.raises(ValueError, match=r"hold the `tool_calls` .* must be a list of dicts"):
            tokenize_row({"messages": [USER, {**ANSWER, "tool_calls": calls}]}, tokenizer)

    def test_an_empty_answer_is_trained_on(self, tokenizer):
        assert tokenize_row({"messages": [USER, {**ANSWER, "content": " "}]}, tokenizer)["completion_ids"] == [EOS]


class TestNoneIsNotGiven:
    """Arrow gives all rows the same keys."""

    ROWS = (
        {"messages": [USER, call(city="Rome")]},
        {"messages": [USER, call("time", zone=1)]},
        {"messages": [USER, ANSWER]},
    )
    TOOLS = (
        {"type": "function", "function": {"name": "a", "parameters": {"properties": {"x": {"type": "string"}}}}},
        {"type": "function", "function": {"name": "b", "parameters": {"properties": {"y": {"enum": ["u"]}}}}},
    )

    @pytest.mark.parametrize("features", [None, Features({"messages": List(Json())})])
    def test_calls_are_written_as_they_were_given(self, features):
        dataset = Dataset.from_list([{"messages": row["messages"]} for row in self.ROWS], features=features)
        for given, row in zip(self.ROWS, dataset, strict=True):
            assert texts(row, QWEN_TOOLS) == texts(given, QWEN_TOOLS)
            assert "null" not in "".join(texts(row, QWEN_TOOLS))
            assert "None" not in "".join(texts(row, QWEN_TOOLS))

    def test_a_list_keeps_its_places(self):
        row = {"messages": [USER, call(days=[1, None, 3])]}
        assert "[1, null, 3]" in texts(row, QWEN_TOOLS)[1]

    def test_template_arguments_are_each_rows_own_in_both_views(self):
        tokenizer = with_template("{% if style is defined %}{{ style }} {% endif %}" + CHAT_TEMPLATE)
        given = [{"other": 1}, {"style": "blue"}, None]
        dataset = Dataset.from_list([{"messages": [USER, ANSWER], "chat_template_kwargs": more} for more in given])
        found = [tokenize_primed_row(row, tokenizer, PrimingTemplate("red ")) for row in dataset]
        assert [ids["prompt_ids"] for ids in found] == [[2, THE, CAT, 3], [BLUE, 2, THE, CAT, 3], [2, THE, CAT, 3]]
        assert found[0]["teacher_prompt_ids"] == [2, RED, THE, CAT, 3]
        assert found[1]["teacher_prompt_ids"] == [BLUE, 2, RED, THE, CAT, 3]

    def test_tools_are_each_rows_own(self):
        template = "{{ tools | tojson }}" + CHAT_TEMPLATE
        rows = [{"messages": [USER, ANSWER], "tools": [tool]} for tool in self.TOOLS]
        for tool, row in zip(self.TOOLS, Dataset.from_list(rows), strict=True):
            assert json.loads(texts(row, template)[0].split("<")[0]) == [tool]

    def test_a_call_without_content_is_written_by_templates_that_need_one(self):
        needs_content = QWEN_TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ m['content'] + ' ' }}")
        assert texts({"messages": [USER, call()]}, needs_content)[1].startswith(" <tool_call>")

    def test_the_word_none_is_never_written(self):
        writes_content = QWEN_TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ m['content'] }}")
        row = {"messages": [USER, call(), {"role": "tool", "content": "mat"}, call("time")]}
        assert "None" not in "".join(texts(row, writes_content))


class TestFailures:
    """What goes wrong in a template says which row, which roles, the template's words and what to do."""

    @pytest.mark.parametrize(
        ("row", "roles"),
        [
            ({"prompt": [ANSWER, USER]}, r"\['assistant', 'user'\]"),
            ({"prompt": [USER], "completion": [USER, ANSWER]}, r"\['user', 'user', 'assistant'\]"),
            ({"messages": [USER, USER, ANSWER]}, r"\['user', 'user'\]"),
        ],
    )
    def test_roles(self, row, roles):
        message = rf"refuses a conversation with the roles {roles}: .*roles must alternate.* Change the data"
        with pytest.raises(ValueError, match=message):
            tokenize_row(row, with_template(ALTERNATING))

    @pytest.mark.parametrize(
        ("written", "words"),
        [
            ("{{ m['content'] + 3 }}", "TypeError"),
            ("{{ m['citations'][0] }}", "citations"),
            ("{{ m['content'].missing() }}", "missing"),
            ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ],
    )
    @pytest.mark.parametrize("role", ["user", "assistant"])
    def test_anything_else(self, written, words, role):
        template = "{% for m in messages %}{% if m.role == '" + role + "' %}" + written + "{% endif %}{% endfor %}"
        dataset = Dataset.from_list([{"messages": [USER, ANSWER]}])
        message = rf"Row 0 of `x`: The chat template refuses .*\['user'.*{words}.*Change the data"
        with pytest.raises(ValueError, match=message):
            tokenize_dataset(dataset, "x", with_template(template), 64, "Answers are needed.")

    def test_arguments_that_the_trainers_set_are_refused(self, tokenizer):
        row = {"prompt": [USER], "chat_template_kwargs": {"add_generation_prompt": False}}
        with pytest.raises(ValueError, match=r"`chat_template_kwargs` hold 'add_generation_prompt'.* Take it out"):
            tokenize_row(row, tokenizer)


class TestReasoning:
    def test_thoughts_of_the_last_answer_are_trained_on_and_earlier_ones_are_forgotten(self):
        thinking = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nsat on"}
        prompt, answer = texts({"messages": [USER, thinking, USER, thinking]}, QWEN3)
        assert prompt == (
            "<|im_start|>user\nthe cat<eos>\n<|im_start|>assistant\nsat on<eos>\n"
            "<|im_start|>user\nthe cat<eos>\n<|im_start|>assistant\n"
        )
        assert answer == "<think>\nhm\n</think>\n\nsat on<eos>"

    def test_without_thinking_the_prompt_has_the_empty_thoughts(self):
        row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}}
        prompt, answer = texts(row, QWEN3)
        assert prompt.endswith("<think>\n\n</think>\n\n")
        assert answer == "sat on<eos>"

    def test_a_prompt_that_opens_thoughts_cannot_be_trained_on_answers(self):
        with pytest.raises(RewrittenPromptError, match="writes a prompt differently once an answer follows"):
            texts({"messages": [USER, ANSWER]}, R1)
        tokenizer = with_template(R1)
        assert tokenize_row({"messages": [USER, ANSWER]}, tokenizer, with_answer=False)["completion_ids"] == []
