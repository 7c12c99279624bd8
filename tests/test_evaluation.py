import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import WORDS, answered_dataset, chat_dataset, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from trl_promptkd import evaluation
from trl_promptkd.cli import main
from trl_promptkd.evaluation import evaluate_model, evaluation_rows, instruction_text
from trl_promptkd.metrics import instruction_scores
from trl_promptkd.rollouts import generate_completions


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


class TestEvaluationRows:
    def read(self, rows, task="instruct", template="plain", **kwargs):
        tokenizer = tiny_tokenizer()
        found = evaluation_rows(Dataset.from_list(rows), "rows", task, tokenizer, template, **kwargs)
        return [tokenizer.decode(ids) for ids in found.prompt_ids], found.references

    def test_the_papers_template(self):
        """As MiniLLM and PromptKD write it, with and without an input."""
        assert instruction_text("Add.") == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
            "\n### Instruction:\nAdd.\n\n### Response:\n"
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
        ],
    )
    def test_columns(self, row, template, prompt, answers):
        assert self.read([row], template=template) == ([prompt], [answers])

    def test_conversations(self):
        tokenizer = tiny_tokenizer()
        found = evaluation_rows(chat_dataset(2), "rows", "instruct", tokenizer, "plain")
        assert tokenizer.decode(found.prompt_ids[0]) == "<user> suppose you <assistant>"
        assert found.references[0] == ["a student"]

    def test_gold_numbers(self):
        assert self.read([{"question": "the", "answer": "3 + 4 = 7\n#### 1,007"}], "gsm8k")[1] == [1007.0]

    def test_first_rows_and_long_prompts(self):
        rows = [{"prompt": "the " * n, "completion": "a"} for n in (1, 5, 2, 9)]
        found = evaluation_rows(Dataset.from_list(rows), "rows", "instruct", tiny_tokenizer(), "plain", 3, 4)
        assert [len(ids) for ids in found.prompt_ids] == [1, 2]
        assert found.left_out == 1

    @pytest.mark.parametrize(
        ("rows", "task", "kwargs", "message"),
        [
            ([{"text": "a"}], "instruct", {}, r"Row 0 of `rows`: it has none of .* its columns are \['text'\]"),
            ([{"instruction": "a", "output": None}], "instruct", {}, "its right answer is None; it must be a text"),
            (
                [{"question": "a", "answer": "no number"}],
                "gsm8k",
                {},
                "Row 0 of `rows`: the right answer is 'no number'",
            ),
            ([{"instruction": "", "output": "a"}], "instruct", {}, "its prompt has no tokens"),
            ([{"messages": [{"role": "user", "content": "a"}]}], "instruct", {}, "ends with an assistant message"),
            (
                [{"prompt": "a b", "completion": "a"}],
                "instruct",
                {"max_prompt_length": 1},
                "all 1 prompts are longer than",
            ),
        ],
    )
    def test_bad_rows_are_refused(self, rows, task, kwargs, message):
        with pytest.raises(ValueError, match=message):
            self.read(rows, task, **kwargs)

    def test_what_is_no_data_set_is_refused(self):
        with pytest.raises(TypeError, match=r"`rows` is a list; it must be a `datasets\.Dataset`"):
            evaluation_rows([], "rows", "instruct", tiny_tokenizer(), "plain")


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
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1, :30].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


class TestEvaluateModel:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_answers_do_not_depend_on_the_batch(self, family, tmp_path):
        """Sampled and greedy; greedily, they are those of each row alone."""
        model, tokenizer = tiny_model(family), tiny_tokenizer()
        found = {}
        for size in (1, 2, 6):
            for seeds in ([10, 20], None):
                folder = tmp_path / f"{size}{seeds}"
                evaluate_model(
                    model,
                    tokenizer,
                    {"rows": answered_dataset(6)},
                    seeds=seeds,
                    max_new_tokens=6,
                    batch_size=size,
                    output_dir=str(folder),
                )
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
        """First tokens of 3,000 seeds against the probabilities; twice the expected total variation is far off."""
        model, tokenizer = tiny_model(), tiny_tokenizer()
        prompt = tokenizer("the cat")["input_ids"]
        config = evaluation.evaluation_config(model, tokenizer, 1, greedy=False)
        ids = generate_completions(
            model, [prompt] * 3000, config, 500, row_seeds=[evaluation.evaluation_seed(10, row) for row in range(3000)]
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
        """Killed after its second batch, with everything before it kept: only the rest is written, and all is as it would have been."""
        monkeypatch.setattr(evaluation, "_SECONDS_A_PART", 0.0)
        model, tokenizer, rows = tiny_model(), tiny_tokenizer(), answered_dataset(6)
        settings = {"seeds": [10, 20], "max_new_tokens": 6, "batch_size": 2}
        whole = evaluate_model(model, tokenizer, {"a": rows}, output_dir=str(tmp_path / "whole"), **settings)
        asked, original = [], evaluation.generate_completions

        def kill(model, prompts, *args, **kwargs):
            if len(asked) == 4:
                raise KeyboardInterrupt
            asked.append(len(prompts))
            return original(model, prompts, *args, **kwargs)

        monkeypatch.setattr(evaluation, "generate_completions", kill)
        with pytest.raises(KeyboardInterrupt):
            evaluate_model(model, tokenizer, {"a": rows}, output_dir=str(tmp_path / "killed"), **settings)
        asked.clear()
        resumed = evaluate_model(
            model, tokenizer, {"a": rows}, output_dir=str(tmp_path / "killed"), **{**settings, "batch_size": 1}
        )
        assert resumed == whole
        assert asked == [1] * 4  # of 12 answers, 8 were there
        assert completions_of(tmp_path / "killed") == completions_of(tmp_path / "whole")
        asked.clear()
        assert evaluate_model(model, tokenizer, {"a": rows}, output_dir=str(tmp_path / "killed"), **settings) == whole
        assert asked == []

    def test_other_weights_prompts_and_settings_have_other_answers(self, tmp_path):
        common = {"seeds": None, "output_dir": str(tmp_path), **SMALL}
        tokenizer, rows = tiny_tokenizer(), answered_dataset(4)
        evaluate_model(tiny_model(), tokenizer, {"a": rows}, **common)
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
            evaluate_model(model, tokenizer, {"a": data}, **{**common, **change})
            assert len(list(tmp_path.iterdir())) == number
        evaluate_model(tiny_model(), tokenizer, {"a": rows}, **common)
        assert len(list(tmp_path.iterdir())) == 6

    @pytest.mark.parametrize(
        "damage",
        [
            "{",
            "[]",
            '{"row": 9, "completion": "a"}',
            '{"row": 0, "completion": 1}',
            '{"row": true, "completion": "a"}',
            "[" * 100_000,
        ],
    )
    def test_damaged_answers_are_named(self, tmp_path, damage):
        settings = {"seeds": None, "output_dir": str(tmp_path), **SMALL}
        evaluate_model(tiny_model(), tiny_tokenizer(), {"a": answered_dataset(4)}, **settings)
        (path,) = tmp_path.iterdir()
        path.write_text(path.read_text() + damage + "\n")
        with pytest.raises(
            ValueError, match=r"a-greedy-.*\.jsonl, line 5, is no answer of this evaluation. Delete the file"
        ):
            evaluate_model(tiny_model(), tiny_tokenizer(), {"a": answered_dataset(4)}, **settings)

    def test_gsm8k_counts_rules(self, monkeypatch):
        rows = Dataset.from_list(
            [{"question": "the", "answer": "#### 7"}, {"question": "the cat sat", "answer": "#### 5"}]
        )
        texts = {"the": "It is 7.", "the cat sat": "\\boxed{6}"}
        tokenizer = without_template()
        monkeypatch.setattr(evaluation, "generate_completions", lambda model, prompts, *args, **kwargs: prompts)
        monkeypatch.setattr(
            PreTrainedTokenizerFast,
            "batch_decode",
            lambda self, rows, **kwargs: [texts[self.decode(ids)] for ids in rows],
        )
        result = evaluate_model(tiny_model(), tokenizer, {"a": rows}, "gsm8k", **SMALL)
        assert result["template"] == "plain"
        assert result["sets"]["a"]["mean"] == {"accuracy": 50.0}
        assert result["sets"]["a"]["std"] == {"accuracy": None}
        assert result["sets"]["a"]["runs"][0]["rules"] == {
            "boxed": {"rows": 1, "correct": 0},
            "first_line": {"rows": 1, "correct": 1},
        }

    def test_padded_vocabularies_give_real_tokens_only(self):
        model = tiny_model(vocab_size=400)
        result = evaluate_model(model, tiny_tokenizer(), {"a": answered_dataset(4)}, seeds=[1], **SMALL)
        assert result["sets"]["a"]["rows"] == 4
        assert evaluation.real_vocab_size(model, tiny_tokenizer()) == 30

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"task": "mmlu"}, "`task` is 'mmlu'; it must be 'instruct' or 'gsm8k'"),
            ({"template": "alpaca"}, "`template` is 'alpaca'; it must be"),
            ({"seeds": []}, r"`seeds` are \[\]"),
            ({"seeds": [1, 1]}, r"`seeds` are \[1, 1\]; they must be different"),
            ({"seeds": [1], "temperature": 0.0}, "`temperature` is 0.0; it must be above 0"),
            ({"seeds": [1], "top_p": float("nan")}, "`top_p` is nan"),
            ({"seeds": [1], "top_k": -1}, "`top_k` is -1"),
            ({"batch_size": 0}, "`batch_size` is 0; it must be above 0"),
            ({"datasets": {}}, "`datasets` is empty"),
            ({"tokenizer": without_template(), "template": "chat"}, "the tokenizer has no chat template"),
            ({"model": tiny_model("gpt2"), "max_new_tokens": 200}, "The model has 128 positions"),
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
        assert "mean of sets" in out
        assert "±" in out
        assert "Loading" not in out
        assert "Loading" in err

    def test_json_is_all_there_is_on_standard_output(self, folder, capsys):
        assert main(flags(folder, "gsm8k", "model", ("problems.jsonl",), "--json")) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["task"] == "gsm8k"
        assert result["settings"]["seeds"] is None
        assert result["sets"]["problems"]["rows"] == 3
        assert result["sets"]["problems"]["runs"][0]["rules"] == {"none": {"rows": 3, "correct": 0}}

    def test_default_seeds_are_the_papers(self, folder, capsys):
        assert main(flags(folder, "instruct", "model", ("rows.jsonl",), "--rows", "2", "--json")) == 0
        result = json.loads(capsys.readouterr().out)
        assert [run["seed"] for run in result["sets"]["rows"]["runs"]] == [10, 20, 30, 40, 50]

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

    def test_errors_are_one_line(self, folder, capsys):
        assert main(flags(folder, "instruct", "model", ("none.jsonl",))) == 2
        assert "there is no such file" in capsys.readouterr().err
        assert main(flags(folder, "instruct", "model", ("rows.jsonl", "rows.jsonl"))) == 2
        assert "Two of `--dataset` are called alike" in capsys.readouterr().err
        assert main(flags(folder, "instruct", "none")) == 2
        assert "beside which there is no tokenizer" in capsys.readouterr().err

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
