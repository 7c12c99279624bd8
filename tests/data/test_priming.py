import pytest
from tiny import answered_dataset

from trl_promptkd import PrimingTemplate
from trl_promptkd.data.priming import PRIMING_TEMPLATES, resolve_priming


USER = {"role": "user", "content": "Where is the cat?"}
ANSWER = {"role": "assistant", "content": "On the mat."}
SYSTEM = {"role": "system", "content": "Be brief."}


class TestThePapersTexts:
    """Copied here a second time, from the paper's released code."""

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (
                "teacher",
                "As a teacher, guide your student through solving the question below. Provide a clear, simple "
                "explanation for someone unfamiliar with the problem. ",
            ),
            (
                "ground_truth",
                "As a smart language model, provide a detailed answer that is clear and feasible for smaller models "
                "to understand and learn from without losing too much detail. ",
            ),
            (
                "confidence",
                "(At the end of the question) Briefly double-check that your answer is correct once done. ",
            ),
        ],
    )
    def test_stand_before_the_question_word_for_word(self, name, text):
        template = resolve_priming(name)
        assert template.prime({"prompt": "How many?"}) == text + "How many?"
        primed = template.prime({"messages": [USER, ANSWER]})
        assert primed == [{"role": "user", "content": text + "Where is the cat?"}]

    @pytest.mark.parametrize(
        "row",
        [
            {"messages": [USER, ANSWER]},
            {"prompt": [USER], "completion": [ANSWER]},
            {"prompt": [USER], "completion": [{**ANSWER, "content": [{"type": "text", "text": "On the mat."}]}]},
            {"prompt": "Where is the cat?", "completion": "On the mat."},
        ],
    )
    def test_the_reference_answer_is_shown(self, row):
        primed = resolve_priming("reference_answer").prime(row)
        text = primed if isinstance(primed, str) else primed[0]["content"]
        assert "On the mat." in text
        assert text.endswith("Where is the cat?")

    def test_a_column_of_that_name_needs_no_answer(self):
        row = {"prompt": "Where?", "reference_answer": "Here. "}
        assert PrimingTemplate("{{ reference_answer }}").prime(row) == "Here. Where?"

    def test_a_row_without_an_answer_cannot_show_one(self):
        with pytest.raises(ValueError, match="reference_answer"):
            resolve_priming("reference_answer").prime({"prompt": "Where?"})
        with pytest.raises(ValueError, match="a row has none"):
            resolve_priming("reference_answer").prime({"prompt": "Where?", "completion": ""})


class TestPlacement:
    def test_prefix_and_suffix_join_without_white_space_of_their_own(self):
        assert PrimingTemplate("a ").prime({"prompt": "b"}) == "a b"
        assert PrimingTemplate("a", placement="suffix").prime({"prompt": "b"}) == "ba"

    def test_the_last_user_turn_is_primed(self):
        turns = [SYSTEM, USER, ANSWER, {"role": "user", "content": "And the dog?"}]
        for row in ({"messages": [*turns, ANSWER]}, {"prompt": turns}):
            primed = PrimingTemplate("Hint. ").prime(row)
            assert primed == [*turns[:3], {"role": "user", "content": "Hint. And the dog?"}]
            primed = PrimingTemplate(" Hint.", "suffix").prime(row)
            assert primed[-1]["content"] == "And the dog? Hint."

    def test_a_tool_turn_after_the_question_stays_as_it_is(self):
        turns = [USER, {"role": "assistant", "content": "", "tool_calls": []}, {"role": "tool", "content": "mat"}]
        primed = PrimingTemplate("Hint. ").prime({"prompt": turns})
        assert primed == [{"role": "user", "content": "Hint. Where is the cat?"}, *turns[1:]]

    def test_system_makes_or_extends_the_system_message(self):
        template = PrimingTemplate("Hint.", placement="system")
        assert template.prime({"prompt": [USER]}) == [{"role": "system", "content": "Hint."}, USER]
        extended = {"role": "system", "content": "Be brief.\n\nHint."}
        assert template.prime({"prompt": [SYSTEM, USER]}) == [extended, USER]

    def test_content_in_parts(self):
        parts = [{"type": "text", "text": "Where?"}]
        primed = PrimingTemplate("Hint. ").prime({"prompt": [{"role": "user", "content": parts}]})
        assert primed[0]["content"] == [{"type": "text", "text": "Hint. "}, *parts]

    def test_the_row_is_not_changed(self):
        row = {"messages": [dict(USER), dict(ANSWER)]}
        PrimingTemplate("Hint. ").prime(row)
        assert row == {"messages": [USER, ANSWER]}


class TestTemplates:
    def test_columns_are_variables(self):
        row = {"prompt": "b", "topic": "cats", "tags": ["x", "y"]}
        assert PrimingTemplate("{{ topic }}: {{ tags | join('+') }} ").prime(row) == "cats: x+y b"

    def test_white_space_is_kept(self, tmp_path):
        path = tmp_path / "priming.txt"
        path.write_bytes("Für dich:\r\n".encode())
        text = PrimingTemplate.from_file(path).prime({"prompt": "b"})
        assert text == "Für dich:\nb"  # Jinja writes plain line breaks
        assert PrimingTemplate("a\n").prime({"prompt": "b"}) == "a\nb"

    def test_what_a_row_says_is_not_a_template(self):
        row = {"prompt": "{{ 7 * 7 }}", "topic": "{% if %}"}
        assert PrimingTemplate("{{ topic }} ").prime(row) == "{% if %} {{ 7 * 7 }}"

    @pytest.mark.parametrize(
        "text", ["{{ gold }} ", "{% if gold %}x{% endif %}", "{% for x in gold %}{{ x }}{% endfor %}"]
    )
    def test_an_unknown_variable_is_named_with_the_columns(self, text):
        template = PrimingTemplate(text)
        with pytest.raises(ValueError, match=r"'gold'.*train_dataset.*\['completion', 'prompt'\]"):
            template.check_columns(answered_dataset(1).column_names, "train_dataset")
        with pytest.raises(ValueError, match=r"'gold'.*\['prompt'\]"):
            template.render({"prompt": "b"})

    def test_variables_of_the_template_itself_are_no_columns(self):
        text = "{% set n = 2 %}{% for i in range(n) %}{{ i }}{% endfor %} "
        PrimingTemplate(text).check_columns(["prompt"], "x")
        assert PrimingTemplate(text).prime({"prompt": "b"}) == "01 b"

    def test_a_missing_key_of_a_column_is_an_error(self):
        with pytest.raises(ValueError, match="has no attribute 'color'"):
            PrimingTemplate("{{ meta.color }} ").prime({"prompt": "b", "meta": {"size": 1}})

    def test_a_broken_template_fails_when_it_is_made(self):
        with pytest.raises(ValueError, match=r"not a valid Jinja template.*line 2"):
            PrimingTemplate("a\n{% if %}")
        with pytest.raises(TypeError, match="must be a string"):
            PrimingTemplate(None)

    def test_none_is_not_written(self):
        """`datasets` fills what a row does not have with None."""
        row = {"prompt": "b", "hint": None}
        with pytest.raises(ValueError, match=r"\['hint', 'prompt'\].*is None"):
            PrimingTemplate("Hint: {{ hint }}. ").render(row)
        assert PrimingTemplate("{% if hint %}Hint: {{ hint }}. {% endif %}").prime(row) == "b"

    def test_names(self):
        assert resolve_priming(None) is None
        own = PrimingTemplate("a")
        assert resolve_priming(own) is own
        with pytest.raises(TypeError, match="is a int"):
            resolve_priming(3)
        assert all(template.text for template in PRIMING_TEMPLATES.values())


class TestSandbox:
    @pytest.mark.parametrize(
        "text",
        [
            "{{ ''.__class__ }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ prompt.__init__.__globals__ }}",
            "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
            "{{ ''['__class__'] }}",
            "{{ '' | attr('__class__') }}",
            "{{ tags.append('x') }}",
            "{{ meta.update({'a': 1}) }}",
            "{{ '%s' % ''.__class__ }}",
            "{{ '{0.__class__}'.format('') }}",
        ],
    )
    def test_python_internals_are_out_of_reach(self, text):
        row = {"prompt": "b", "tags": ["x"], "meta": {"a": 0}}
        with pytest.raises(ValueError, match="sandbox does not allow"):
            PrimingTemplate(text).render(row)
        assert row == {"prompt": "b", "tags": ["x"], "meta": {"a": 0}}

    def test_huge_loops_and_texts_are_refused(self):
        with pytest.raises(ValueError, match="Range too big"):
            PrimingTemplate("{% for i in range(10000000) %}x{% endfor %}").render({"prompt": "b"})
        for text in ("{% for i in range(1000) %}{{ prompt }}{% endfor %}", "{{ prompt * 1000 }}"):
            with pytest.raises(ValueError, match="more than 1000000 characters"):
                PrimingTemplate(text).render({"prompt": "b" * 2000})

    def test_an_unknown_filter_is_named_with_its_line(self):
        with pytest.raises(ValueError, match=r"No filter named 'shout'.*\(line 2\)"):
            PrimingTemplate("a\n{{ prompt | shout }}")

    def test_plain_arithmetic_works(self):
        assert PrimingTemplate("{{ 2 * 3.5 }} ").prime({"prompt": "b"}) == "7.0 b"
