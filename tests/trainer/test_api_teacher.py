"""Response priming on answers from an OpenAI-compatible server: no teacher runs here."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from chat_server import asked, reversed_words
from datasets import Dataset
from paths import ROOT
from runs import short_run
from safetensors.torch import load_file
from tiny import answered_dataset, chat_dataset, difference, prompt_dataset, tiny_model, tiny_tokenizer, weights
from trainers import equal, logged, needs_sft, trained, trained_rows
from trl import SFTConfig, SFTTrainer

from trl_promptkd import PrimingTemplate
from trl_promptkd.generation.openai_server import KEY_VARIABLE
from trl_promptkd.losses.primed_distill import primed_loss_sums


@pytest.fixture
def by_api(primed, server):
    """Makes a trainer whose teacher is the server."""

    def make(model=None, **settings):
        settings = {"response_source": "teacher", "teacher_answers_url": server.url, **settings}
        return primed(model, teacher_model=None, **settings)

    return make


class TestTraining:
    def test_equals_supervised_fine_tuning_on_the_primed_answers(self, by_api, server, tmp_path):
        """TRL's own trainer on the same rows: losses of six steps, and the weights after them."""
        needs_sft()
        steps = {"max_steps": 6, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.05}
        trainer = by_api(train_dataset=prompt_dataset(), loss_chunk_size=5, **steps)
        assert trainer.args.alpha == 1.0
        trainer.train()

        rows = [{"prompt": row["prompt"], "completion": f" {backwards(row)}"} for row in prompt_dataset()]
        args = short_run(lambda max_new_tokens, **settings: SFTConfig(**settings), tmp_path / "sft", steps)
        reference = SFTTrainer(
            tiny_model(seed=1), args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
        )
        reference.train()
        assert logged(trainer, "loss") == pytest.approx(logged(reference, "loss"), rel=1e-4)
        assert difference(weights(trainer.model), weights(reference.model)) < 1e-5

    def test_the_server_sees_the_priming_text_and_the_student_does_not(self, by_api, server):
        rows = trained_rows(by_api(train_dataset=prompt_dataset(2), max_new_tokens=7, temperature=0.5, top_p=0.9))
        prompts = [row["prompt"] for row in prompt_dataset(2)]
        assert sorted(map(asked, server.bodies)) == sorted(f"red blue green {prompt}" for prompt in prompts)
        for body in server.bodies:
            assert body.keys() == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
            assert (body["max_tokens"], body["temperature"], body["top_p"]) == (7, 0.5, 0.9)
        assert sorted(row[0] for row in rows) == sorted(tiny_tokenizer()(prompts)["input_ids"])
        for prompt, teacher_prompt, completion in rows:
            assert teacher_prompt == prompt
            assert completion == [*reversed([23, 24, 25, *prompt]), 0]

    def test_samples_are_not_asked_for_if_completions_are_logged(self, by_api):
        trainer = by_api(log_completions=True, max_steps=2)
        trainer.train()
        assert trainer._samples.row_kls == {}

    def test_named_sets_that_come_later_are_answered_once(self, by_api, server):
        trainer = by_api(train_dataset=prompt_dataset(2))
        found = trainer.evaluate({"a": prompt_dataset(4), "b": prompt_dataset(3)})
        assert {"eval_a_loss", "eval_b_loss"} <= found.keys()
        asked_for = [asked(body) for body in server.bodies]
        assert len(asked_for) == len(set(asked_for)) == 4

    def test_no_bar_if_none_is_wanted(self, by_api, capsys):
        by_api(disable_tqdm=True)
        assert "Teacher answers" not in capsys.readouterr().err

    def test_conversations_are_answered_behind_the_students_own_template(self, by_api, server):
        rows = trained_rows(
            by_api(train_dataset=chat_dataset(), priming=PrimingTemplate("red", "system"), max_steps=4)
        )
        assert len(server.requests) == 8
        assert all(body["messages"][0] == {"role": "system", "content": "red"} for body in server.bodies)
        for prompt, _, completion in rows:
            assert completion == [*reversed(prompt[1:-1]), 0]

    def test_rows_that_are_left_out_are_not_asked_for_and_the_others_keep_their_answers(self, by_api, server):
        rows = trained_rows(by_api(train_dataset=prompt_dataset(), max_length=3, shuffle_dataset=True, max_steps=4))
        assert 0 < len(server.requests) < 8
        assert all(completion == [*reversed([23, 24, 25, *prompt]), 0] for prompt, _, completion in rows)

    def test_greedy_decoding_is_temperature_0(self, by_api, server):
        by_api(generation_kwargs={"do_sample": False}, temperature=0.7, top_p=0.5)
        assert {(body["temperature"], body["top_p"]) for body in server.bodies} == {(0.0, 1.0)}

    def test_answers_that_were_cut_have_no_end_and_empty_ones_nothing_to_train_on(self, by_api, server):
        """Also in a micro-batch of their own."""

        def answer(body):
            return ("", "length") if len(asked(body).split()) % 2 else (reversed_words(body), "length")

        server.answer = answer
        trainer = by_api(per_device_train_batch_size=1, max_steps=8)
        rows = trained_rows(trainer)
        assert {len(completion) % 2 for _, _, completion in rows} == {0}
        assert sum(not completion for _, _, completion in rows) == 4
        assert all(0 not in completion for _, _, completion in rows)
        assert all(loss == loss for loss in logged(trainer, "loss"))

    def test_no_teacher_runs_and_nothing_is_logged_of_one(self, by_api):
        trainer, passes = by_api(max_steps=2, eval_dataset=answered_dataset(4), eval_strategy="epoch"), []
        trainer.model.get_decoder().layers[0].register_forward_hook(lambda *_: passes.append(1))
        trainer.train()
        assert len(passes) == 2 + 1  # steps, and a batch of evaluation
        names = set().union(*trainer.state.log_history)
        assert {"loss", "ce", "entropy/student", "mean_token_accuracy", "completion_tokens"} <= names
        assert not [name for name in names if "teacher" in name or "kl/" in name or name.endswith("kd")]
        assert not [name for name in names if "gain" in name]
        assert logged(trainer, "loss") == pytest.approx(logged(trainer, "ce"), rel=1e-6)

    def test_evaluation_rows_are_answered_too(self, by_api, server):
        trainer = by_api(train_dataset=prompt_dataset(2), eval_dataset={"a": prompt_dataset(3)})
        assert len(server.requests) == 3
        metrics = trainer.evaluate(prompt_dataset(4))
        assert len(server.requests) == 4
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce"], rel=1e-6)
        assert trainer.predict(prompt_dataset(4)).metrics["test_ce"] == pytest.approx(metrics["eval_ce"])
        assert len(server.requests) == 4
        assert "eval_a_ce" in trainer.evaluate()


class TestResuming:
    def test_a_second_run_asks_for_nothing(self, by_api, server):
        first = trained(by_api(max_steps=3))
        server.__exit__()
        assert equal(trained(by_api(max_steps=3, teacher_answers_model="teacher")), first)
        assert len(server.requests) == 8

    def test_a_resumed_run_equals_an_uninterrupted_one(self, by_api, server):
        whole = trained(by_api(max_steps=4))
        by_api(max_steps=4, save_strategy="steps", save_steps=2).train()
        resumed = by_api(max_steps=4)
        resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
        assert difference(whole, weights(resumed.model)) == 0
        assert len(server.requests) == 8

    def test_answers_may_be_elsewhere(self, by_api, server, tmp_path):
        by_api(teacher_answers_dir=str(tmp_path / "answers"), output_dir=str(tmp_path / "a"))
        by_api(teacher_answers_dir=str(tmp_path / "answers"), output_dir=str(tmp_path / "b"))
        assert len(server.requests) == 8


@pytest.mark.slow
def test_two_ranks_share_the_requests_and_train_as_one_does(server, tmp_path):
    script = ROOT / "tests" / "scripts" / "api_run.py"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for name, launcher, rows in (("alone", [], 4), ("two", torchrun, 2)):
        (tmp_path / name).mkdir()
        server.requests.clear()
        command = [sys.executable, *launcher, script, server.url, tmp_path / name, str(rows)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        assert len({asked(body) for body in server.bodies}) == len(server.requests) == 13
    said = [
        json.loads((tmp_path / path).read_text()) for path in ("alone/rank0.json", "two/rank0.json", "two/rank1.json")
    ]
    assert said[0]["answers"] == said[1]["answers"] == said[2]["answers"]
    assert said[1]["losses"] == pytest.approx(said[0]["losses"], rel=1e-4)
    alone, first, second = (
        load_file(tmp_path / path)
        for path in ("alone/rank0.safetensors", "two/rank0.safetensors", "two/rank1.safetensors")
    )
    assert equal(first, second)
    assert difference(alone, first) < 1e-5
    parts = list((tmp_path / "two" / "run" / "_teacher_answers").iterdir())
    assert len(parts) == 2  # one of each rank


class TestKey:
    def test_is_in_no_file_and_no_log(self, by_api, server, monkeypatch, tmp_path, caplog, propagate, capfd):
        server.key = "sk-very-secret"
        monkeypatch.setenv(KEY_VARIABLE, server.key)
        server.faults.append((503, {"error": "loading"}))
        with caplog.at_level(logging.DEBUG):
            trainer = by_api(save_strategy="steps", save_steps=1)
            trainer.train()
            trainer.save_model()
            trainer.create_model_card()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {"training_args.bin", "README.md", "trainer_state.json"} <= {path.name for path in files}
        assert any(path.suffix == ".parquet" for path in files)
        assert not [path for path in files if b"very-secret" in path.read_bytes()]
        assert "very-secret" not in caplog.text + repr(trainer.args) + "".join(capfd.readouterr())


class TestCard:
    def test_names_the_teacher_and_what_it_saw(self, by_api, server):
        server.models = ["some/teacher"]
        trainer = by_api()
        trainer.train()
        trainer.create_model_card()
        with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as file:
            card = file.read()
        assert (
            "It was distilled from [some/teacher](https://huggingface.co/some/teacher) on a server, which saw" in card
        )
        assert "The teacher saw this text before the question" in card
        assert "trained on the teacher's answers alone, which came over an API" in card
        assert "| `alpha` | `1.0` |" in card
        assert not re.search("kd_temperature|kd_beta|127.0.0.1", card)


class TestRefusals:
    """See also test_bad_inputs.py."""

    def test_a_server_that_is_not_there_before_models_are_looked_for(self, by_api):
        with pytest.raises(ConnectionError, match=r"did not answer.*Check `teacher_answers_url`"):
            by_api("no/such-student", teacher_answers_url="http://127.0.0.1:9")

    def test_a_server_that_refuses_before_models_are_looked_for(self, by_api):
        with pytest.raises(ValueError, match=r"HTTP 404.*`other` does not exist"):
            by_api("no/such-student", teacher_answers_model="other")

    def test_streamed_rows(self, by_api):
        with pytest.raises(ValueError, match="`train_dataset` is streamed, but with `response_source='teacher'`"):
            by_api(train_dataset=prompt_dataset().to_iterable_dataset())

    def test_no_receipt(self, by_api):
        with pytest.raises(ValueError, match="needs a teacher of its own"):
            by_api().quantization_receipt()

    def test_answers_that_need_more_positions_than_the_student_has(self, by_api, server):
        """Its tokens are not the teacher's: `max_new_tokens` does not bound them."""
        server.answer = lambda body: " cat" * 130
        with pytest.raises(ValueError, match="The student has 128 positions, but the longest row needs 13"):
            by_api(tiny_model("gpt2"))


def backwards(row):
    return reversed_words({"prompt": f"red blue green {row['prompt']}"}).strip()


def test_the_loss_without_a_teacher_is_that_of_alpha_1():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7).unbind(0), torch.tensor([0, 3, 6, 2, 2])
    logits[0][1, 4] = -torch.inf
    student = [logits[0].clone().requires_grad_() for _ in range(2)]
    settings = {"alpha": 1.0, "temperature": 2.0}
    hard = primed_loss_sums(student[0], None, tokens, **settings)
    both = primed_loss_sums(student[1], logits[1], tokens, **settings)
    for name in ("loss", "cross_entropy", "student_entropy", "accuracy"):
        assert getattr(hard, name).item() == pytest.approx(getattr(both, name).item(), rel=1e-5), name
    hard.loss.backward()
    both.loss.backward()
    assert torch.allclose(student[0].grad, student[1].grad, atol=1e-6)
    assert primed_loss_sums(student[0], None, tokens, with_metrics=False, **settings).accuracy == 0
    assert hard.divergence is hard.teacher_entropy is None
