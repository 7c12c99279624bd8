import json
import os
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import WORDS, answered_dataset, chat_dataset, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from trl_promptkd import evaluation
from trl_promptkd.cli import main, parse_args
from trl_promptkd.cli.eval import _load_set
from trl_promptkd.data import tokenize_row
from trl_promptkd.evaluation import evaluate_model, evaluation_rows
from trl_promptkd.evaluation.answers import model_source
from trl_promptkd.evaluation.rows import instruction_text
from trl_promptkd.generation import store
from trl_promptkd.generation.rollouts import generate_completions
from trl_promptkd.metrics import instruction_scores


def instructions(size=6):
    rows = [
        {
            "instruction": " ".join(WORDS[i : i + 2 + i % 4]),
            "input": WORDS[i] if i % 2 else "",
            "output": " ".join(WORDS[i + 1 : i + 4]),
        }
        for i in range(size)
    ]
    return Dataset.from_list(rows)


def without_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


SMALL = {"max_new_tokens": 6, "batch_size": 4}
TURNS = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


class TestEvaluationRows:
    def read(self, rows, task="instruct", template="plain", **kwargs):
        tokenizer, rows = tiny_tokenizer(), Dataset.from_list(rows) if isinstance(rows, list) else rows
        found = evaluation_rows(rows, "rows", task, tokenizer, template, **kwargs)
        return [tokenizer.decode(ids) for ids in found.prompt_ids], found.references

    def test_the_papers_template(self):
        """As MiniLLM and PromptKD write it, with and without an input."""
        assert instruction_text("Add.") == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Response:\n"
        )
        assert instruction_text("Add.", "1, 2") == (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n"
            "\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
        )

    @pytest.mark.parametrize(
        ("row", "template", "prompt", "answers"),
        [
            ({"instruction": "the cat", "input": "", "output": "sat"}, "plain", "the cat", ["sat"]),
            ({"instruction": "the cat", "output": ["sat", "on"]}, "plain", "the cat", ["sat", "on"]),
            ({"instruction": "the", "output": "a", "references": ["a", "b"]}, "plain", "the", ["a", "b"]),
            ({"instruction": "the", "input": "red", "output": "a"}, "plain", "the red", ["a"]),
            ({"instruction": "the", "input": "red", "output": "a"}, "chat", "<user> the red <assistant>", ["a"]),
            ({"question": "the", "answer": "a"}, "chat", "<user> the <assistant>", ["a"]),
            ({"prompt": "the cat", "completion": " sat"}, "chat", "the cat", [" sat"]),
            ({"prompt": "the cat", "references": ["x", "y"]}, "plain", "the cat", ["x", "y"]),
            ({"messages": TURNS}, "plain", "<user> the cat <assistant>", ["sat"]),
            ({"messages": TURNS[:1], "references": ["x", "y"]}, "plain", "<user> the cat <assistant>", ["x", "y"]),
            ({"question": "the", "answer": "3 + 4 = 7\n#### 1,007"}, "gsm8k", "the", [1007.0]),
        ],
    )
    def test_columns(self, row, template, prompt, answers):
        task, template = ("gsm8k", "plain") if template == "gsm8k" else ("instruct", template)
        assert self.read([row], task, template) == ([prompt], [answers])

    @pytest.mark.parametrize("template", ["chat", "plain"])
    def test_tools_and_template_settings_reach_the_chat_template_as_in_training(self, template):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% if tools %}red {% endif %}{{ color }} " + tokenizer.chat_template
        more = {"tools": [{"name": "red"}], "chat_template_kwargs": {"color": "blue"}}
        rows = [
            {"messages": TURNS, **more},
            {"prompt": TURNS[:1], "references": ["sat"], **more},
            {"instruction": "the cat", "output": "sat", **more},
        ]
        for row in rows if template == "chat" else rows[:2]:
            dataset = Dataset.from_list([row])
            (ids,) = evaluation_rows(dataset, "rows", "instruct", tokenizer, template).prompt_ids
            assert tokenizer.decode(ids) == "red blue <user> the cat <assistant>"
            assert ids == tokenize_row({"messages": TURNS, **more}, tokenizer)["prompt_ids"]

    def test_a_prefill_is_continued_and_whole_turns_stay(self):
        answer = {"role": "assistant", "content": "on mat"}
        prefilled = self.read([{"prompt": TURNS, "completion": [answer]}])
        assert prefilled == (["<user> the cat <assistant> sat"], [["on mat"]])
        whole = "<user> the cat <assistant> sat <eos> <assistant>"
        assert self.read([{"messages": [*TURNS, answer]}]) == ([whole], [["on mat"]])

    def test_parts_of_text_are_joined_and_images_are_refused(self):
        def parts(*texts):
            return [{"type": "text", "text": text} for text in texts]

        row = {
            "messages": [
                {"role": "user", "content": parts("the ", "cat")},
                {"role": "assistant", "content": parts("sat", " on")},
            ]
        }
        assert self.read([row]) == (["<user> the cat <assistant>"], [["sat on"]])
        row["messages"][0]["content"].append({"type": "image", "text": None})
        with pytest.raises(ValueError, match=r"Row 0 of `rows`: .*content part of the type 'image'"):
            self.read([row])
        with pytest.raises(ValueError, match="Row 0 of `rows`: A row's `image` column is not empty"):
            self.read([{"instruction": "the cat", "output": "sat", "image": "x.png"}])

    @pytest.mark.parametrize("form", ["torch", "numpy"])
    def test_formats_and_transforms(self, form):
        dataset = chat_dataset(1)
        expected = (["<user> suppose you <assistant>"], [["a student"]])
        assert self.read(dataset.with_format(form)) == self.read(dataset) == expected
        dataset = dataset.with_transform(lambda batch: {"instruction": ["red"], "output": ["blue"]})
        assert self.read(dataset) == (["red"], [["blue"]])

    def test_an_answer_that_the_template_rewrites_the_prompt_for_does_no_harm(self):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template += "{% if add_generation_prompt %}red{% endif %}"
        found = evaluation_rows(chat_dataset(1), "rows", "instruct", tokenizer, "plain")
        assert tokenizer.decode(found.prompt_ids[0]) == "<user> suppose you <assistant> red"

    def test_first_rows_and_long_prompts(self):
        rows = [{"prompt": "the " * n, "completion": "a"} for n in (1, 5, 2, 9)]
        found = evaluation_rows(Dataset.from_list(rows), "rows", "instruct", tiny_tokenizer(), "plain", 3, 4)
        assert [len(ids) for ids in found.prompt_ids] == [1, 2]
        assert found.left_out == 1

    @pytest.mark.parametrize(
        ("rows", "task", "kwargs", "message"),
        [
            (
                [{"question": "a", "answer": "no number"}],
                "gsm8k",
                {},
                "Row 0 of `rows`: the right answer is 'no number'",
            ),
            ([{"instruction": " ", "output": "a"}], "instruct", {"template": "chat"}, "its `instruction` is ' '"),
            ([{"instruction": "a", "output": True}], "instruct", {}, "its right answer is True; it must be a text"),
            ([{"messages": TURNS[:1]}], "instruct", {}, "ends with an assistant message"),
            ([{"messages": TURNS[1:]}], "instruct", {}, "ends with an assistant message"),
            ([{"prompt": "a b", "completion": "a"}], "instruct", {"max_prompt_length": 1}, "all 1 prompts are longer"),
        ],
    )
    def test_bad_rows_are_refused(self, rows, task, kwargs, message):
        with pytest.raises(ValueError, match=message):
            self.read(rows, task, **kwargs)


def completions_of(folder):
    return {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.glob("*.jsonl")
    }


@torch.no_grad()
def greedy_alone(model, tokenizer, prompt, steps=6):
    """The likeliest of the real tokens, one after the other, without padding, cache or `generate`."""
    ids, start = tokenizer(prompt)["input_ids"], len(tokenizer(prompt)["input_ids"])
    for _ in range(steps):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def evaluate(rows=None, model=None, tokenizer=None, **settings):
    """Of one data set, with a tiny model."""
    rows = answered_dataset(6) if rows is None else rows
    return evaluate_model(model or tiny_model(), tokenizer or tiny_tokenizer(), {"a": rows}, **{**SMALL, **settings})


class TestEvaluateModel:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_answers_do_not_depend_on_the_batch(self, family, tmp_path):
        """Sampled and greedy; greedily, they are those of each row alone."""
        model, tokenizer = tiny_model(family), tiny_tokenizer()
        found = {}
        for size in (1, 2, 6):
            for seeds in ([10, 20], None):
                folder = tmp_path / f"{size}{seeds}"
                evaluate(model=model, seeds=seeds, batch_size=size, output_dir=str(folder))
                found[size, seeds is None] = completions_of(folder)
        assert found[1, False] == found[2, False] == found[6, False]
        assert found[1, True] == found[2, True] == found[6, True]
        assert len(found[1, False]) == 2
        first, second = found[1, False].values()
        assert [row["completion"] for row in first] != [row["completion"] for row in second]
        (greedy,) = found[1, True].values()
        for row, line in zip(answered_dataset(6), greedy, strict=True):
            assert line["completion"] == greedy_alone(model, tokenizer, row["prompt"])

    def test_samples_follow_the_models_distribution(self):
        """First tokens of 3,000 equal prompts against the probabilities."""
        model, tokenizer = tiny_model(), tiny_tokenizer()
        prompt = tokenizer("the cat")["input_ids"]
        config = evaluation.evaluation_config(model, tokenizer, 1, greedy=False)
        ids = generate_completions(
            model, [prompt] * 3000, config, 500, row_seeds=evaluation.evaluation_seeds(10, [prompt] * 3000)
        )
        counts = torch.bincount(torch.tensor([row[0] for row in ids]), minlength=40) / 3000
        with torch.no_grad():
            probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        assert 0.5 * (counts - probabilities).abs().sum() < 0.06
        assert probabilities.max() < 0.9

    def test_scores_are_those_of_the_kept_answers(self, tmp_path):
        model, tokenizer, rows = tiny_model(), without_template(), instructions()
        result = evaluate_model(model, tokenizer, {"a": rows}, seeds=[1, 2, 3], output_dir=str(tmp_path), **SMALL)
        files = completions_of(tmp_path)
        assert result["template"] == "paper"
        references = [[row["output"]] for row in rows]
        by_seed = {}
        for name, lines in files.items():
            assert "### Instruction:" not in lines[0]["completion"]
            by_seed[name.split("-")[1]] = instruction_scores([line["completion"] for line in lines], references)
        runs = result["sets"]["a"]["runs"]
        assert {
            f"seed{run['seed']}": {"rougeL": run["rougeL"], "exact_match": run["exact_match"]} for run in runs
        } == by_seed
        values = torch.tensor([run["rougeL"] for run in runs], dtype=torch.float64)
        assert values.std() > 0
        assert result["sets"]["a"]["mean"]["rougeL"] == pytest.approx(values.mean().item())
        assert result["sets"]["a"]["std"]["rougeL"] == pytest.approx(values.std().item())

    def test_a_killed_run_goes_on_where_it_was(self, tmp_path, monkeypatch):
        """Killed after its second batch: only the rest is written, and all is as it would have been."""
        monkeypatch.setattr(store, "SECONDS_A_PART", 0.0)
        model, rows = tiny_model(), answered_dataset(6)
        settings = {"seeds": [10, 20], "batch_size": 2}
        whole = evaluate(rows, model, output_dir=str(tmp_path / "whole"), **settings)
        asked, original = [], evaluation.answers.generate_completions

        def kill(model, prompts, *args, **kwargs):
            if len(asked) == 4:
                raise KeyboardInterrupt
            asked.append(len(prompts))
            return original(model, prompts, *args, **kwargs)

        monkeypatch.setattr(evaluation.answers, "generate_completions", kill)
        with pytest.raises(KeyboardInterrupt):
            evaluate(rows, model, output_dir=str(tmp_path / "killed"), **settings)
        asked.clear()
        resumed = evaluate(rows, model, output_dir=str(tmp_path / "killed"), **{**settings, "batch_size": 1})
        assert resumed == whole
        assert asked == [1] * 4  # of 12 answers, 8 were there
        assert completions_of(tmp_path / "killed") == completions_of(tmp_path / "whole")
        asked.clear()
        assert evaluate(rows, model, output_dir=str(tmp_path / "killed"), **settings) == whole
        assert asked == []

    def test_answers_are_of_the_prompt_whatever_rows_are_before_it(self, tmp_path):
        rows = Dataset.from_list(
            [{"prompt": text, "completion": "a"} for text in ("the cat", "dog", "the cat", "red")]
        )
        for name, part in (("all", rows), ("last", rows.select([3, 2]))):
            common = {"seeds": [3], "output_dir": str(tmp_path / name), "max_new_tokens": 6}
            evaluate(part, **common)
        ((one, _, two, last),) = completions_of(tmp_path / "all").values()
        ((again, first),) = completions_of(tmp_path / "last").values()
        assert again["completion"] == last["completion"]
        assert first["completion"] == one["completion"] != two["completion"]  # equal prompts are told apart

    def test_what_was_cut_is_told_from_what_ended(self, tmp_path):
        model, rows = tiny_model(), answered_dataset(6)
        settings = {"seeds": [1, 2], "max_new_tokens": 12, "output_dir": str(tmp_path)}
        result = evaluate(rows, model, **settings)
        shares = [run["terminated_share"] for run in result["sets"]["a"]["runs"]]
        assert 0 < sum(shares) < 2
        lines = sorted(completions_of(tmp_path).items())
        for share, (_, answers) in zip(shares, lines, strict=True):
            lengths = [len(tiny_tokenizer()(line["completion"])["input_ids"]) for line in answers]
            assert [line["ended"] for line in answers] == [length < 12 for length in lengths]
            assert share == sum(line["ended"] for line in answers) / 6
        assert result["sets"]["a"]["terminated_share"] == pytest.approx(sum(shares) / 2)
        assert evaluate(rows, model, **settings) == result  # of the kept answers

    def test_two_runs_of_one_evaluation_leave_each_other_their_answers(self, tmp_path, monkeypatch):
        """A second run begins, and ends, while the first one is in its second batch."""
        monkeypatch.setattr(store, "SECONDS_A_PART", 0.0)
        model, rows = tiny_model(), answered_dataset(6)
        settings = {"max_new_tokens": 6, "batch_size": 2, "output_dir": str(tmp_path)}
        original, calls = evaluation.answers.generate_completions, []

        def generate(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                (path,) = tmp_path.glob("*.jsonl")
                being_written = tmp_path / f"{path.name}.1.incomplete"
                being_written.write_text("half")
                evaluate(rows, model, **settings)
                assert being_written.exists()
            if len(calls) == 5:  # the first run has written its second batch over what the second one wrote
                assert len(next(iter(completions_of(tmp_path).values()))) == 6
            return original(*args, **kwargs)

        monkeypatch.setattr(evaluation.answers, "generate_completions", generate)
        evaluate(rows, model, **settings)
        assert len(calls) == 5

    def test_what_a_killed_run_left_half_written_goes(self, tmp_path):
        settings = {"max_new_tokens": 6, "output_dir": str(tmp_path)}
        evaluate(answered_dataset(2), **settings)
        (path,) = tmp_path.iterdir()
        left, other = tmp_path / f"{path.name}.1.incomplete", tmp_path / "b.jsonl.1.incomplete"
        for file in (left, other):
            file.write_text("half")
            os.utime(file, (0, 0))
        evaluate(answered_dataset(2), **settings)
        assert (left.exists(), other.exists()) == (False, True)

    def test_adapters_configurations_and_tokenizers_have_answers_of_their_own(self, tmp_path):
        """One model in memory: with and without adapter, another, a stronger one, other positions, tokenizers."""
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), config)
        model.add_adapter("other", config)
        tokenizer, rows = tiny_tokenizer(), answered_dataset(6)
        found = []

        def check(expected_files, tokenizer=tokenizer):
            evaluate(rows, model, tokenizer, output_dir=str(tmp_path))
            files = completions_of(tmp_path)
            new = [name for name in files if name not in dict(found)]
            found.extend((name, [line["completion"] for line in files[name]]) for name in new)
            assert len(found) == expected_files

        check(1)
        with model.disable_adapter():
            check(2)
        model.set_adapter("other")
        check(3)
        model.set_adapter("default")
        check(3)
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 8.0)
        check(4)
        model.config.rope_parameters = {**(model.config.rope_parameters or {}), "rope_theta": 20.0}
        check(5)
        check(6, tiny_tokenizer([*WORDS[:-2], "five", "six"]))
        answers = [texts for _, texts in found]
        assert answers[1] == [greedy_alone(tiny_model(), tokenizer, row["prompt"]) for row in rows]
        assert all(texts != answers[0] for texts in answers[1:4])

    def test_a_soft_prompt_that_is_off_has_answers_of_its_own(self, tmp_path):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = get_peft_model(tiny_model(), config)
        settings = {"output_dir": str(tmp_path), **SMALL}
        evaluate(answered_dataset(2), model, **settings)
        with model.disable_adapter():
            evaluate(answered_dataset(2), model, **settings)
        assert len(completions_of(tmp_path)) == 2

    def test_a_tokenizer_that_has_padded_is_the_same_one(self):
        model, tokenizer = tiny_model(), tiny_tokenizer()
        before = model_source(model, tokenizer)
        tokenizer(["the cat", "the"], padding=True, truncation=True, max_length=3)
        assert model_source(model, tokenizer) == before

    def test_other_weights_prompts_and_settings_have_other_answers(self, tmp_path):
        common = {"seeds": None, "output_dir": str(tmp_path), **SMALL}
        rows = answered_dataset(4)
        evaluate(rows, **common)
        for number, (model, data, change) in enumerate(
            [
                (tiny_model(seed=1), rows, {}),
                (tiny_model(), answered_dataset(5), {}),
                (tiny_model(), rows, {"max_new_tokens": 5}),
                (tiny_model(), rows, {"seeds": [1]}),
                (tiny_model(), rows, {"seeds": [1], "temperature": 0.5}),
            ],
            2,
        ):
            evaluate(data, model, **{**common, **change})
            assert len(list(tmp_path.iterdir())) == number
        evaluate(rows, **common)
        assert len(list(tmp_path.iterdir())) == 6

    @pytest.mark.parametrize(
        "damage",
        [
            "{",
            "[]",
            '{"row": 9, "prompt": "", "completion": "a", "ended": true}',
            '{"row": 0, "prompt": "", "completion": 1, "ended": true}',
            '{"row": 0, "prompt": "", "completion": "a", "ended": 1}',
            '{"row": 0, "prompt": "", "completion": "a"}',
            '{"row": true, "prompt": "", "completion": "a", "ended": true}',
            "[" * 100_000,
        ],
    )
    def test_damaged_answers_are_named(self, tmp_path, damage):
        settings = {"seeds": None, "output_dir": str(tmp_path), **SMALL}
        evaluate(answered_dataset(4), **settings)
        (path,) = tmp_path.iterdir()
        path.write_text(path.read_text() + damage + "\n")
        with pytest.raises(
            ValueError, match=r"a-greedy-.*\.jsonl, line 5, is no answer of this evaluation. Delete the file"
        ):
            evaluate(answered_dataset(4), **settings)

    def test_gsm8k_has_three_readings(self, monkeypatch):
        rows = Dataset.from_list(
            [{"question": "the", "answer": "#### 7"}, {"question": "the cat sat", "answer": "#### 5"}]
        )
        texts = {"the": "It is 7.", "the cat sat": "6 - 1\n\\boxed{5} of 6"}
        tokenizer = without_template()
        monkeypatch.setattr(
            evaluation.answers, "generate_completions", lambda model, prompts, *args, **kwargs: prompts
        )
        monkeypatch.setattr(
            PreTrainedTokenizerFast,
            "batch_decode",
            lambda self, rows, **kwargs: [texts[self.decode(ids)] for ids in rows],
        )
        result = evaluate_model(tiny_model(), tokenizer, {"a": rows}, "gsm8k", **SMALL)
        assert result["template"] == "plain"
        assert result["sets"]["a"]["mean"] == {"strict": 0.0, "flexible": 50.0, "paper": 100.0}
        assert result["sets"]["a"]["std"] == {"strict": None, "flexible": None, "paper": None}
        (run,) = result["sets"]["a"]["runs"]
        assert {rule: run[rule] for rule in ("strict", "flexible", "paper")} == result["sets"]["a"]["mean"]

    @pytest.mark.parametrize("opened", [False, True])
    def test_thoughts_do_not_count(self, opened, monkeypatch):
        """Nor if the chat template opened them, and `max_new_tokens` cut them."""
        texts = ["<think> a dog </think> the cat", "a dog </think> the cat", "<think> the cat", "the cat"]
        tokenizer = tiny_tokenizer([*WORDS, "<think>"])
        if opened:
            tokenizer.chat_template = tokenizer.chat_template.replace("<assistant> {%", "<assistant> <think> {%")
        monkeypatch.setattr(
            evaluation.answers, "generate_completions", lambda model, prompts, *args, **kwargs: prompts
        )
        monkeypatch.setattr(PreTrainedTokenizerFast, "batch_decode", lambda self, rows, **kwargs: texts[: len(rows)])
        rows = Dataset.from_list([{"instruction": "who", "output": "the cat"}] * 4)
        (run,) = evaluate_model(tiny_model(), tokenizer, {"a": rows}, "instruct", **SMALL)["sets"]["a"]["runs"]
        expected = 50.0 if opened else 75.0
        assert (run["rougeL"], run["exact_match"]) == (expected, expected)

    def test_a_quoted_think_tag_in_the_question_opens_nothing(self):
        tokenizer = tiny_tokenizer([*WORDS, "<think>", "</think>"])
        prompts = ["<user> <think> <assistant>", "<assistant> <think> </think>", "<assistant> <think>", "<think>"]
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        assert evaluation.judged_texts(tokenizer, ids, ["a"] * 4) == ["a", "a", "<think>a", "<think>a"]

    def test_gsm8k_any_of_the_right_answers_is_right(self):
        answers, references = ["It is 7.", "#### 8", "No.", "It is 9."], [[5.0, 7.0], [8.0, 9.0], [1.0, 2.0], [8.0]]
        assert evaluation.row_scores("gsm8k", answers, references) == {
            "strict": [0, 100, 0, 0],
            "flexible": [100, 100, 0, 0],
            "paper": [100, 100, 0, 0],
        }

    def test_the_hash_of_the_data_is_of_prompts_and_right_answers(self):
        rows = answered_dataset(2)
        other = rows.map(lambda row: {"completion": "cat"})
        result = evaluate_model(tiny_model(), tiny_tokenizer(), {"a": rows, "b": rows, "c": other}, **SMALL)
        a, b, c = (values["data_hash"] for values in result["sets"].values())
        assert a == b != c

    def test_padded_vocabularies_give_real_tokens_only(self):
        model = tiny_model(vocab_size=400)
        result = evaluate_model(model, tiny_tokenizer(), {"a": answered_dataset(4)}, seeds=[1], **SMALL)
        assert result["sets"]["a"]["rows"] == 4
        assert evaluation.real_vocab_size(model, tiny_tokenizer()) == 40

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"template": "alpaca"}, "`template` is 'alpaca'; it must be"),
            ({"seeds": [1, 1]}, r"`seeds` are \[1, 1\]; they must be different"),
            ({"seeds": [1], "temperature": 0.0}, "`temperature` is 0.0; it must be above 0"),
            ({"seeds": [1], "top_p": float("nan")}, "`top_p` is nan"),
            ({"seeds": [1], "top_k": -1}, "`top_k` is -1"),
            ({"top_p": 0.9}, "`top_p` is 0.9, but answers are greedy"),
            ({"datasets": {}}, "`datasets` is empty"),
            ({"tokenizer": without_template(), "template": "chat"}, "the tokenizer has no chat template"),
        ],
    )
    def test_bad_settings_are_refused(self, change, message):
        arguments = {"model": tiny_model(), "tokenizer": tiny_tokenizer(), "datasets": {"a": answered_dataset(2)}}
        with pytest.raises(ValueError, match=message):
            evaluate_model(**{**arguments, **change})


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = tiny_model(seed=2), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in instructions(8)))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in instructions(4)))
    problems = [{"question": "the cat", "answer": f"#### {i}"} for i in range(3)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return tmp_path


def flags(folder, task="instruct", model="model", data=("rows.jsonl",), *more):
    sets = [flag for name in data for flag in ("--dataset", str(folder / name))]
    return ["eval", task, "--model", str(folder / model), *sets, "--max_new_tokens", "6", *more]


class TestCommand:
    def test_table_of_sets(self, folder, capsys):
        assert main(flags(folder, "instruct", "model", ("rows.jsonl", "more/rows.jsonl"), "--seeds", "1", "2")) == 0
        out, err = capsys.readouterr()
        assert "instruct, template chat, sampled, seeds 1 2" in out
        assert "more/rows" in out
        assert all(text in out for text in ("mean of sets", "±", "ended, %", "split train, data "))
        assert "Loading" not in out
        assert "Loading" in err

    def test_json_is_all_there_is_on_standard_output(self, folder, capsys):
        assert main(flags(folder, "gsm8k", "model", ("problems.jsonl",), "--json")) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["task"] == "gsm8k"
        assert result["settings"]["seeds"] is None
        assert result["sets"]["problems"]["rows"] == 3
        assert result["sets"]["problems"]["mean"] == {"strict": 0, "flexible": 0, "paper": 0}

    def test_what_was_evaluated_is_in_the_result_and_the_default_seeds_are_the_papers(self, folder, capsys):
        assert main(flags(folder, "instruct", "model", ("rows.jsonl",), "--dataset_split", "train[:2]", "--json")) == 0
        result = json.loads(capsys.readouterr().out)["sets"]["rows"]
        assert (result["source"], result["split"], result["rows"]) == (str(folder / "rows.jsonl"), "train[:2]", 2)
        assert 0 <= result["terminated_share"] <= 1
        assert [run["seed"] for run in result["runs"]] == [10, 20, 30, 40, 50]

    def test_an_adapter_and_its_merged_model_answer_alike(self, folder, capsys):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_model(seed=2), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        )
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.3)
        model.peft_config["default"].base_model_name_or_path = str(folder / "model")
        model.save_pretrained(folder / "adapter")
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        tiny_tokenizer().save_pretrained(folder / "merged")
        answers = {}
        for name in ("model", "adapter", "merged"):
            out = folder / f"answers_{name}"
            assert main(flags(folder, "instruct", name, ("rows.jsonl",), "--greedy", "--output_dir", str(out))) == 0
            (lines,) = completions_of(out).values()
            answers[name] = [line["completion"] for line in lines]
        assert answers["adapter"] == answers["merged"]
        assert answers["adapter"] != answers["model"]

    def test_columns_that_are_named_win(self, folder, capsys):
        rows = [
            {
                "instruction": "the cat",
                "question": "a dog",
                "output": "1",
                "references": ["2"],
                "mine": "red",
                "gold": "3",
            }
        ]
        (folder / "wide.json").write_text(json.dumps(rows[0]))
        columns = ("--prompt_column", "mine", "--completion_column", "gold")
        out = folder / "out"
        assert main(flags(folder, "gsm8k", "model", ("wide.json",), *columns, "--output_dir", str(out))) == 0
        ((line,),) = completions_of(out).values()
        assert line["prompt"] == "red"
        capsys.readouterr()
        seen = []
        for more in (columns[:2], columns[2:], ()):
            args = parse_args(flags(folder, "gsm8k", "model", ("wide.json",), *more))
            found = evaluation_rows(_load_set(args, args.dataset[0]), "a", "gsm8k", tiny_tokenizer(), "plain")
            seen.append((tiny_tokenizer().decode(found.prompt_ids[0]), found.references[0]))
        assert seen == [("red", [2.0]), ("the cat", [3.0]), ("the cat", [2.0])]
        assert main(flags(folder, "gsm8k", "model", ("wide.json",), "--prompt_column", "none")) == 2
        assert "`--prompt_column` is 'none'; the columns are" in capsys.readouterr().err

    def test_the_harness_is_named_where_it_is_installed(self, folder, capsys, monkeypatch):
        import importlib.util

        original = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *args: SimpleNamespace() if name == "lm_eval" else original(name, *args),
        )
        assert main(flags(folder, "gsm8k", "model", ("problems.jsonl",))) == 0
        assert "lm_eval --model hf --model_args pretrained=" in capsys.readouterr().err
