import json
import math
import os
import shutil

import pytest
import torch
from pandas import DataFrame
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from reference import kl, log_probs
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, WORDS, prompt_dataset, save_models, save_rows, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from trl_promptkd import PromptEncoderConfig, PromptKDTrainer, SoftPrompt
from trl_promptkd.analysis.plots import changes_page, plot_drift, plot_similarity
from trl_promptkd.analysis.prompt import by_class, nearest_tokens, prompt_drift, prompt_effect, similarity
from trl_promptkd.analysis.saved_prompt import find_prompts, initial_prompt
from trl_promptkd.analysis.token_classes import TOKEN_CLASSES, token_classes
from trl_promptkd.cli import main


PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]
ANSWERS = [[9, 8, 0], [20], [21, 6, 11, 10, 12, 0]]


def some_prompt(virtual=3, seed=1):
    return torch.randn(virtual, 32, generator=torch.Generator().manual_seed(seed))


class TestNearestTokens:
    @pytest.mark.parametrize("family", ["llama", "gemma3"])  # Gemma scales its embeddings
    def test_a_prompt_at_known_tokens_finds_them(self, family):
        teacher = tiny_model(family)
        with torch.no_grad():
            embeddings = teacher.get_input_embeddings()(torch.arange(40)).float()
        found = nearest_tokens(torch.stack([embeddings[7], 2 * embeddings[21]]), teacher, 40, number=3)
        typical = float(embeddings.norm(dim=-1).median())
        for of_token, token, away in zip(found, (7, 21), (0.0, float(embeddings[21].norm()) / typical), strict=True):
            best = of_token["cosine"][0]
            assert best["id"] == token
            assert best["cosine"] == pytest.approx(1, abs=1e-5)
            assert best["distance"] == pytest.approx(away, abs=1e-5)
        assert found[0]["distance"][0]["id"] == 7
        expected = [float((2 * embeddings[21] - embeddings[i]).norm()) / typical for i in range(40)]
        by_distance = sorted(range(40), key=expected.__getitem__)[:3]
        assert [token["id"] for token in found[1]["distance"]] == by_distance
        assert found[1]["distance"][0]["distance"] == pytest.approx(expected[by_distance[0]], rel=1e-5)

    def test_padding_of_the_vocabulary_is_never_near(self):
        teacher = tiny_model()
        embeddings = teacher.get_input_embeddings().weight.detach()
        assert nearest_tokens(embeddings[35:36], teacher, 40)[0]["cosine"][0]["id"] == 35
        assert all(token["id"] < 30 for token in nearest_tokens(embeddings[35:36], teacher, 30)[0]["cosine"])


class TestDrift:
    def test_values_by_hand(self):
        drift = prompt_drift(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        assert drift["relative"] == pytest.approx([4 / 3, 1.0])
        assert drift["cosine"] == pytest.approx([3 / 5, 1.0])
        assert drift["overall"] == pytest.approx(math.sqrt(17 / 10))

    def test_it_is_0_at_the_start_and_what_is_logged_later(self):
        prompt = SoftPrompt(PromptEncoderConfig(), tiny_model(), tiny_tokenizer())
        start = prompt_drift(prompt().detach(), prompt.initial)
        assert (set(start["relative"]), start["overall"]) == ({0.0}, 0.0)
        assert start["cosine"] == pytest.approx([1.0] * 7)
        prompt.encoder.embedding.weight.data.add_(some_prompt(7))
        assert prompt_drift(prompt().detach(), prompt.initial)["overall"] == pytest.approx(prompt.drift())

    def test_similarity_by_hand(self):
        assert similarity(torch.tensor([[2.0, 0.0], [3.0, 3.0]])).flatten().tolist() == pytest.approx(
            [1, math.sqrt(0.5), math.sqrt(0.5), 1]
        )


class Bytes:
    """A tokenizer of the bytes below, whose characters may be spread over two tokens."""

    pieces = (b"<eos>", b"<mark>", b" The", b" c", b"a", b"'", b"s", b"\n", b"4", b" ", b"(", b"\xc3", b"\xa9")
    all_special_ids = (0, 1)

    def decode(self, ids, **kwargs):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


class TestTokenClasses:
    def test_each_class(self):
        classes = {
            b" The": "first token",
            b" c": "word start",
            b"a": "word continuation",
            b"'": "punctuation",
            b"s": "word continuation",  # of "ca's"
            b"\n": "whitespace",
            b"4": "number",
            b" ": "whitespace",
            b"(": "punctuation",
            b"\xc3": "other",  # half a character
            b"<mark>": "other",
            b"<eos>": "end of text",
        }
        ids = [Bytes.pieces.index(piece) for piece in classes]
        assert token_classes([7], ids, Bytes(), {0}) == list(classes.values())
        assert set(classes.values()) == set(TOKEN_CLASSES)

    def test_words_without_marks_of_their_own(self):
        tokenizer = tiny_tokenizer()
        ids = tokenizer("the cat . sat")["input_ids"]
        expected = ["first token", "word start", "punctuation", "word start", "end of text"]
        assert token_classes([7], [*ids, 0], tokenizer, {0}) == expected
        assert token_classes([7], [0], tiny_tokenizer(), {0}) == ["first token"]


class TestPromptEffect:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("batch_size", [2, 8])
    def test_it_equals_each_row_alone(self, family, batch_size):
        teacher, student, soft_prompt = tiny_model(family, seed=2), tiny_model(family, seed=1), some_prompt()
        tokenizer = tiny_tokenizer()
        rest = (PROMPTS, ANSWERS, tokenizer, {0}, batch_size)
        tokens, changes = prompt_effect(teacher, soft_prompt, student, *rest, max_changes=4)
        plain_kl, student_kl, moved = [], [], []
        with torch.no_grad():
            for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
                ids, first = prompt + answer, len(prompt)
                pp = log_probs(teacher, ids, first, soft_prompt)
                p, q = log_probs(teacher, ids, first), log_probs(student, ids, first)
                for place in range(len(answer)):
                    plain_kl.append(float(kl(pp[place], p[place])))
                    student_kl.append(float(kl(pp[place], q[place])))
                    if int(pp[place].argmax()) != int(p[place].argmax()):
                        moved.append((plain_kl[-1], row, place, pp[place], p[place], q[place]))
        assert tokens.prompted_plain.tolist() == pytest.approx(plain_kl, rel=1e-3, abs=1e-5)
        assert tokens.prompted_student.tolist() == pytest.approx(student_kl, rel=1e-3, abs=1e-5)

        classes = ["first token", "word start", "end of text", "first token", "first token"]
        assert tokens["class"][:5].tolist() == classes
        table = by_class(tokens)
        firsts = [0, 3, 4]
        assert table.tokens["first token"] == 3
        assert table.prompted_plain["first token"] == pytest.approx(sum(plain_kl[i] for i in firsts) / 3, rel=1e-3)
        assert table.prompted_student["first token"] == pytest.approx(sum(student_kl[i] for i in firsts) / 3, rel=1e-3)
        assert table.tokens["all tokens"] == 10
        assert table.prompted_plain["all tokens"] == pytest.approx(sum(plain_kl) / 10, rel=1e-3)
        assert table.share[:-1].sum() == pytest.approx(1)

        assert tokens.changed.sum() == len(moved) > 4
        moved.sort(key=lambda item: -item[0])
        for change, (there, row, place, pp, p, q) in zip(changes.itertuples(), moved[:4], strict=True):
            assert (change.row, change.place) == (row, place)
            assert change.kl == pytest.approx(there, rel=1e-3)
            for top, log_p in ((change.prompted, pp), (change.plain, p), (change.student, q)):
                values, ids = log_p.topk(3)
                assert [text.strip() for text, _ in top] == [tokenizer.decode([i]).strip() for i in ids.tolist()]
                assert [share for _, share in top] == pytest.approx(values.exp().tolist(), rel=1e-3)
            assert change.context == tokenizer.decode([*PROMPTS[row], *ANSWERS[row][:place]])

    def test_without_a_student(self):
        tokens, changes = prompt_effect(tiny_model(), some_prompt(), None, PROMPTS, ANSWERS, tiny_tokenizer(), {0})
        assert by_class(tokens).columns.tolist() == ["tokens", "prompted_plain", "share"]
        assert "student" not in changes


def changed(context, token, top):
    names = ["row", "place", "kl", "context", "token", "prompted", "plain", "student"]
    return DataFrame([[0, 1, 0.5, context, token, top, top, top]], columns=names)


class TestPage:
    def test_text_from_data_is_escaped_and_whole(self):
        bad = "<script>alert('x')</script>" + "a" * 99
        page = changes_page(changed(bad, bad, [(bad, 0.5)] * 3), bad, bad)
        assert "<script" not in page
        assert page.count("&lt;script&gt;") == page.count("a" * 99) == 2 + 1 + 2 + 9

    def test_line_breaks_and_tabs_are_seen(self):
        page = changes_page(changed("a", "\n", [("\t", 0.5)] * 3), "t", "s")
        assert page.count(r"'\n'") == 1
        assert page.count(r"'\t' 0.500") == 9


def saved_by_peft(folder, tokenizer=None, **settings):
    """Saves PEFT's own soft prompt, moved by 1; returns its start."""
    model = get_peft_model(
        tiny_model(),
        PromptTuningConfig(task_type="CAUSAL_LM", tokenizer_name_or_path=tokenizer and str(tokenizer), **settings),
    )
    weight = model.prompt_encoder.default.embedding.weight.detach()
    start = weight.clone()
    weight.add_(1)
    model.save_pretrained(folder / "adapter")
    return start


class TestSavedPrompts:
    def test_a_runs_checkpoints_in_order_from_its_start(self, tmp_path, make_args):
        args = make_args(output_dir=str(tmp_path / "run"), max_steps=3, save_strategy="steps", save_steps=1)
        trainer = PromptKDTrainer(
            model=tiny_model(seed=1),
            teacher_model=tiny_model(seed=2),
            args=args,
            train_dataset=prompt_dataset(8),
            processing_class=tiny_tokenizer(),
            prompt_encoder_config=PromptEncoderConfig(num_virtual_tokens=4, prompt_learning_rate=0.05),
        )
        trainer.train()
        trainer.save_model()
        prompts = find_prompts(str(tmp_path / "run"))
        # The last is saved twice
        assert [prompt.name for prompt in prompts] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
        initial, known_by = initial_prompt(prompts, tiny_model(seed=2), tiny_tokenizer())
        assert known_by == "the start that was saved with the prompt"
        start = tiny_model(seed=2).get_input_embeddings().weight[tiny_tokenizer()("Suppose you are a")["input_ids"]]
        assert initial.equal(start.detach())
        overall = [prompt_drift(prompt.embeddings, initial)["overall"] for prompt in prompts]
        assert overall[0] > 0
        assert overall[-1] == pytest.approx(trainer.soft_prompt.drift())
        shutil.rmtree(tmp_path / "run" / "checkpoint-2" / "teacher_prompt")  # as a killed run may leave it
        assert [prompt.step for prompt in find_prompts(str(tmp_path / "run"))] == [1, 3]
        assert find_prompts(str(tmp_path / "run" / "checkpoint-1"))[0].embeddings.equal(prompts[0].embeddings)
        # A run that went on after its last checkpoint
        trainer.soft_prompt.encoder.embedding.weight.data.add_(1)
        trainer.save_model()
        assert [prompt.step for prompt in find_prompts(str(tmp_path / "run"))] == [1, 3, None]

    @pytest.mark.parametrize("encoder", ["embedding", "mlp", "lstm"])
    def test_every_encoders_adapter(self, tmp_path, encoder):
        prompt = SoftPrompt(PromptEncoderConfig(encoder=encoder, prompt_init="random"), tiny_model(), tiny_tokenizer())
        prompt.save_adapter(str(tmp_path / "teacher_prompt"))
        (found,) = find_prompts(str(tmp_path))
        assert found.embeddings.equal(prompt().detach())
        assert found.initial.equal(prompt.initial)

    @pytest.mark.parametrize("number", [2, 3, 9])
    def test_a_text_that_peft_embedded_is_embedded_again(self, tmp_path, number):
        """Its special tokens too."""
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            "<system> $A", special_tokens=[("<system>", 4)]
        )
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the cat sat"}
        start = saved_by_peft(tmp_path, num_virtual_tokens=number, tokenizer=tmp_path / "tokenizer", **text)
        assert start[0].equal(tiny_model().get_input_embeddings().weight[4])
        (prompt,) = find_prompts(str(tmp_path / "adapter"))
        torch.testing.assert_close(prompt.embeddings, start + 1)
        initial, known_by = initial_prompt([prompt], tiny_model(), tokenizer)
        assert "'the cat sat', embedded again" in known_by
        assert initial.equal(start)

    def test_a_random_start_of_pefts_is_not_known_or_the_first_checkpoints(self, tmp_path):
        saved_by_peft(tmp_path, num_virtual_tokens=3)
        (prompt,) = find_prompts(str(tmp_path / "adapter"))
        assert initial_prompt([prompt], tiny_model(), tiny_tokenizer())[0] is None
        initial, known_by = initial_prompt([prompt, prompt], tiny_model(), tiny_tokenizer())
        assert initial.equal(prompt.embeddings)
        assert known_by.startswith("adapter, as")

    def test_what_is_no_soft_prompt_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no soft prompt"):
            find_prompts(str(tmp_path))
        get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
        with pytest.raises(ValueError, match="holds a LORA adapter"):
            find_prompts(str(tmp_path / "lora"))
        for step, virtual in ((1, 3), (2, 4)):
            prompt = SoftPrompt(PromptEncoderConfig(num_virtual_tokens=virtual), tiny_model(), tiny_tokenizer())
            prompt.save_adapter(str(tmp_path / "mixed" / f"checkpoint-{step}" / "teacher_prompt"))
        with pytest.raises(ValueError, match="not of one run"):
            find_prompts(str(tmp_path / "mixed"))
        broken = tmp_path / "mixed" / "checkpoint-1" / "teacher_prompt"
        save_file({"prompt_embeddings": torch.full((3, 32), float("nan"))}, broken / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="is not finite"):
            find_prompts(str(broken))


@pytest.fixture
def folder(tmp_path):
    save_models(tmp_path, teacher=tiny_model(seed=2), student=tiny_model(seed=1))
    rows = [{"question": " ".join(WORDS[i : i + 2 + i % 4]), "answer": f" {WORDS[i]} ."} for i in range(12)]
    save_rows(tmp_path / "rows.jsonl", rows)
    prompt = SoftPrompt(PromptEncoderConfig(num_virtual_tokens=3), tiny_model(seed=2), tiny_tokenizer())
    for step in (1, 2):
        prompt.encoder.embedding.weight.data.add_(some_prompt(seed=step))
        prompt.save_adapter(str(tmp_path / "run" / f"checkpoint-{step}" / "teacher_prompt"))
    return tmp_path


def flags(folder, *more, dataset=True):
    data = ("--dataset", str(folder / "rows.jsonl"), "--prompt_column", "question", "--completion_column", "answer")
    return [
        *("analyze", "prompt", "--teacher", str(folder / "teacher"), "--prompt", str(folder / "run")),
        *(data if dataset else ()),
        *("--rows", "9", "--max_new_tokens", "6", "--output_dir", str(folder / "out"), *more),
    ]


class TestCommand:
    @pytest.mark.parametrize("responses", ["dataset", "student"])
    def test_tables_plots_and_page(self, folder, capsys, responses):
        assert main(flags(folder, "--model", str(folder / "student"), "--responses", responses)) == 0
        out = capsys.readouterr().out
        assert "checkpoint-2" in out
        assert "end of text" in out or responses == "student"
        files = ["changes.html", "drift.png", "kl_by_class.png", "prompt.json", "similarity.png"]
        assert sorted(os.listdir(folder / "out")) == files
        result = json.loads((folder / "out" / "prompt.json").read_text())
        assert [entry["step"] for entry in result["drift"]] == [1, 2]
        tokens = result["classes"]["all tokens"]["tokens"]
        assert result["changed"]["of"] == tokens
        assert tokens == 27 if responses == "dataset" else tokens != 27  # word, full stop, end of text
        assert result["classes"]["first token"]["tokens"] == 9

    def test_a_drift_that_is_not_finite_is_null_in_the_json(self, folder, capsys):
        """A start of zeros has no direction and no length."""
        path = folder / "run" / "checkpoint-2" / "teacher_prompt" / "prompt_encoder.safetensors"
        tensors = load_file(path)
        save_file({name: t.zero_() if name == "initial" else t for name, t in tensors.items()}, path)
        assert main(flags(folder, "--json", dataset=False)) == 0
        out = capsys.readouterr().out
        for text in (out, (folder / "out" / "prompt.json").read_text()):
            assert json.loads(text, parse_constant=pytest.fail)["drift"][-1]["overall"] is None
        # The prompt alone is looked at
        result = json.loads(out)
        assert len(result["nearest"]) == 3
        assert "classes" not in result
        assert sorted(os.listdir(folder / "out")) == ["drift.png", "prompt.json", "similarity.png"]

    def test_another_teachers_prompt(self, folder, capsys):
        tiny_model(seed=2, **{**CONFIGS["llama"][1], "hidden_size": 64}).save_pretrained(folder / "teacher")
        assert main(flags(folder)) == 2
        assert "has 32 numbers a token, but the teacher's embeddings have 64" in capsys.readouterr().err


class TestPlots:
    def test_many_checkpoints_many_tokens_and_a_last_prompt(self, tmp_path):
        drift = {"relative": [0.5] * 30, "cosine": [0.9] * 30, "overall": 0.5}
        last = {"step": None, **drift}
        plot_drift([*({"step": step, **drift} for step in range(1, 60)), last], str(tmp_path / "drift.png"))
        plot_drift([last], str(tmp_path / "one.png"))
        plot_similarity(torch.eye(30), str(tmp_path / "similarity.png"))
        assert all((tmp_path / name).stat().st_size > 5000 for name in ("drift.png", "one.png", "similarity.png"))
