"""A teacher on a server: training with it is training with the same teacher beside the student."""

import pytest
import torch
from datasets import Dataset
from pooling_server import Answer, PoolingServer
from tiny import answered_dataset, prompt_dataset, save_models, tiny_model, weights
from trainers import GREEDY, SAVES, SGD, logged, lora, tiny_teacher, trained_parts
from transformers import TrainerCallback

from trl_promptkd.generation import teacher_server


BOUND = {"float32": 1e-4, "bfloat16": 2e-3}  # relative
# Beside losses, what is logged: read off the teacher's distribution, and how it compares with the student's
LOGGED = ("loss", "ce", "kd", "kl/student_teacher", "entropy/teacher", "grad_norm")


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr(teacher_server, "_PAUSES", (0.0, 0.01, 0.01))


@pytest.fixture
def teacher(tmp_path):
    """The teacher; its folder is `tmp_path / "teacher"`."""
    model = tiny_teacher()
    save_models(tmp_path, teacher=model)
    return model


@pytest.fixture
def server(teacher, tmp_path):
    with PoolingServer(teacher, name=str(tmp_path / "teacher")) as running:
        yield running


@pytest.fixture
def served(primed, server, tmp_path):
    """Makes a trainer whose teacher is the server's."""

    def make(dtype="float32", **overrides):
        overrides = {"teacher_server": server.url, "teacher_server_dtype": dtype, **overrides}
        return primed(teacher_model=str(tmp_path / "teacher"), **overrides)

    return make


def relative(a, b):
    """How far two sets of weights are apart, for their length."""
    one, other = (torch.cat([value.flatten() for value in part.values()]) for part in (a, b))
    return float((one - other).norm() / other.norm())


SETTINGS = {"max_steps": 6, "gradient_accumulation_steps": 2, "seed": 3, **SGD}


class TestTraining:
    @pytest.mark.parametrize("dtype", BOUND)
    @pytest.mark.parametrize(
        ("kd_beta", "kd_temperature", "source"),
        [
            (0.0, 1.0, "dataset"),
            (0.0, 5.942, "student"),
            (0.5, 1.0, "student"),
            (0.5, 5.942, "dataset"),
            (1.0, 1.0, "student"),
            (1.0, 5.942, "dataset"),
        ],
    )
    def test_is_as_with_the_teacher_beside_the_student(
        self, served, primed, teacher, dtype, source, kd_temperature, kd_beta
    ):
        sampled = {"generation_kwargs": GREEDY, "max_new_tokens": 4} if source == "student" else {}
        settings = {"kd_temperature": kd_temperature, "kd_beta": kd_beta, "response_source": source, **sampled}
        live, remote = (
            make(**SETTINGS, **settings, **teachers)
            for make, teachers in ((primed, {"teacher_model": teacher}), (served, {"dtype": dtype}))
        )
        live.train()
        remote.train()
        for name in LOGGED:
            assert len(logged(live, name)) == 6
            assert logged(remote, name) == pytest.approx(logged(live, name), rel=BOUND[dtype], abs=1e-6), name
        assert logged(remote, "teacher/top1_agreement") == pytest.approx(
            logged(live, "teacher/top1_agreement"), abs=0.1
        )
        gains = [logged(trainer, "priming/gain_nats") for trainer in (remote, live)]
        assert len(gains[0]) == 1
        # A difference of two log-probabilities of about 2 nats, each within the bound
        assert gains[0] == pytest.approx(gains[1], abs=2 * 2 * BOUND[dtype])
        assert relative(weights(remote.model), weights(live.model)) < BOUND[dtype]
        assert relative(weights(live.model), weights(tiny_model(seed=1))) > 1e-3  # something was learned

    def test_of_an_adapter(self, served, primed, teacher):
        trainers = [
            make(**SETTINGS, peft_config=lora(), **given)
            for make, given in ((primed, {"teacher_model": teacher}), (served, {}))
        ]
        for trainer in trainers:
            trainer.train()
        assert logged(trainers[1], "loss") == pytest.approx(logged(trainers[0], "loss"), rel=1e-4)

    def test_sends_only_rows_that_are_trained_on_and_each_once(self, served, server):
        rows = answered_dataset(8).to_list()
        trainer = served(
            train_dataset=Dataset.from_list(rows), max_steps=2, gradient_accumulation_steps=2, priming=None
        )
        before = len(server.rows)
        trainer.train()
        sent = server.rows[before:]
        tokenizer = trainer.processing_class
        assert sorted(sent) == sorted(
            tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows
        )  # all but the end of text, after which nothing is predicted

    def test_asks_for_the_next_micro_batches_while_one_is_trained_on(self, served, server, monkeypatch):
        trainer = served(gradient_accumulation_steps=4, train_dataset=answered_dataset(8), priming=None)
        before, seen, original = len(server.bodies), [], trainer.training_step

        def watched(*args, **kwargs):
            loss = original(*args, **kwargs)
            seen.extend([trainer.teacher._sent[0][1].result()] if trainer.teacher._sent else [])
            seen_bodies.append(len(server.bodies) - before)
            return loss

        seen_bodies = []
        monkeypatch.setattr(trainer, "training_step", watched)
        trainer.train()
        assert len(seen) == 3  # under way when the step before ended
        assert seen_bodies[-1] == 4
        assert not trainer.teacher._sent

    def test_with_empty_completions(self, served, primed, teacher):
        rows = answered_dataset(4).to_list()
        rows[1]["completion"] = ""
        data = Dataset.from_list(rows)
        settings = {"train_dataset": data, "per_device_train_batch_size": 4, "max_steps": 2}
        live, remote = primed(teacher_model=teacher, **settings), served(**settings)
        live.train()
        remote.train()
        assert logged(remote, "loss") == pytest.approx(logged(live, "loss"), rel=1e-4)

    def test_by_a_field_of_the_configuration_or_an_argument(self, primed, server, tmp_path):
        name = str(tmp_path / "teacher")
        by_field = primed(
            teacher_model=None, args=primed.args(teacher_server=server.url, teacher_model_name_or_path=name)
        )
        by_argument = primed(teacher_model=name, teacher_server=server.url)
        for trainer in (by_field, by_argument):
            trainer.train()
        assert logged(by_field, "loss") == logged(by_argument, "loss")
        assert by_field.teacher_model is None
        assert not by_field.is_self_distillation

    def test_says_where_the_teacher_ran_but_not_its_address(self, served, server, tmp_path):
        trainer = served()
        trainer.train()
        trainer.create_model_card()
        card = (tmp_path / "run" / "README.md").read_text()
        assert " on a server, which saw" in card
        assert server.url not in card


class TestEvaluation:
    @pytest.mark.parametrize("source", ["dataset", "student"])
    def test_is_as_with_the_teacher_beside_the_student(self, served, primed, teacher, source):
        settings = {"response_source": source, "generation_kwargs": GREEDY, "eval_dataset": answered_dataset(5)}
        live, remote = primed(teacher_model=teacher, **settings), served(**settings)
        expected, found = live.evaluate(), remote.evaluate()
        names = [name for name in expected if not name.endswith(("runtime", "per_second"))]
        assert "eval_priming/gain_nats" in names
        assert {name: found[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-3, abs=1e-5
        )

    def test_in_the_middle_of_a_training_changes_nothing(self, served):
        losses = []
        for more in ({}, {"eval_dataset": answered_dataset(5), "eval_strategy": "steps", "eval_steps": 1}):
            trainer = served(**SETTINGS, **more)
            trainer.train()
            losses.append(logged(trainer, "loss"))
        assert losses[0] == losses[1]

    def test_within_a_window_does_not_take_what_was_sent_for_it(self, served):
        class Evaluates(TrainerCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                trainer.evaluate(answered_dataset(3))

        plain = served(**SETTINGS)
        plain.train()
        trainer = served(**SETTINGS, callbacks=[Evaluates()])
        trainer.train()
        assert logged(trainer, "ce") == logged(plain, "ce")

    def test_predicts(self, served, primed, teacher):
        expected = primed(teacher_model=teacher).predict(answered_dataset(3))
        found = served().predict(answered_dataset(3))
        assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-4)


class TestAServerThatStops:
    @pytest.mark.parametrize("source", ["dataset", "student"])
    def test_leaves_the_last_checkpoint_from_which_training_ends_as_without_it(
        self, served, server, teacher, source, tmp_path
    ):
        settings = {**SETTINGS, **SAVES, "response_source": source, "optim": "adamw_torch"}
        whole = served(**settings, output_dir=str(tmp_path / "whole"))
        whole.train()

        broken = served(**settings)
        server.before_pooling = lambda: server.faults.extend(
            [lambda _: Answer(0, b"")] * 4 if broken.state.global_step == 3 and broken.teacher._sent else []
        )
        with pytest.raises(ConnectionError, match=r"did not answer /pooling in 4 tries .*resume_from_checkpoint=True"):
            broken.train()
        assert broken.state.global_step == 3
        assert not broken.teacher._sent

        with PoolingServer(teacher, name=server.name) as another:
            resumed = served(**settings, teacher_server=another.url)
            resumed.train(resume_from_checkpoint=True)
        expected = trained_parts(whole)
        assert all(torch.equal(value, expected[name]) for name, value in trained_parts(resumed).items())

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (lambda answer: Answer(200, answer.body, "none"), "`metadata` is not"),
            (lambda _: Answer.error(400, "out of memory"), "status 400: .*out of memory"),
        ],
    )
    def test_answers_badly_in_the_middle_of_a_training(self, served, server, fault, message):
        trainer = served(**SETTINGS)
        server.faults = [lambda answer: answer] * 5 + [fault] * 3
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step > 0

    def test_a_passing_fault_changes_nothing(self, served, server):
        losses = []
        for faults in ([], [lambda _: Answer(503, b"")] * 2):
            server.faults = []
            trainer = served(**SETTINGS)
            server.faults = list(faults)
            trainer.train()
            losses.append(logged(trainer, "loss"))
        assert losses[0] == losses[1]


class TestRefusals:
    def test_without_a_name(self, primed, server):
        for given, told in ((None, "is None"), (tiny_model(), "is a LlamaForCausalLM")):
            with pytest.raises(ValueError, match=f"`teacher_model` {told}. Pass the name or the folder"):
                primed(teacher_model=given, teacher_server=server.url)

    def test_with_a_cache(self, served):
        with pytest.raises(ValueError, match="`teacher_cache` and `teacher_server` are both set"):
            served(teacher_cache="cache")

    def test_answers_of_the_teacher(self, served):
        with pytest.raises(ValueError, match="a server in pooling mode writes no answers"):
            served(response_source="teacher", train_dataset=prompt_dataset())

    def test_another_model_before_any_weights_are_loaded(self, primed, server, tmp_path):
        save_models(tmp_path, other=tiny_model())
        with pytest.raises(ValueError, match=r"serves '.*teacher', but `teacher_model` is '.*other'"):
            primed("no/such-student", str(tmp_path / "other"), teacher_server=server.url)

    @pytest.mark.parametrize("when", ["at the start", "later"])
    def test_rows_that_are_too_long_for_the_server(self, served, server, when):
        server.max_model_len = 12
        rows = Dataset.from_list([{"prompt": "cat " * 9, "completion": "dog"}])
        told = "takes rows of at most 11 tokens, but the longest row needs 13 .*--max-model-len 14"
        if when == "later":
            trainer = served()
        with pytest.raises(ValueError, match=told):
            trainer.evaluate(rows) if when == "later" else served(train_dataset=rows)

    def test_samples_that_may_become_too_long_for_the_server(self, served, server):
        server.max_model_len = 12
        with pytest.raises(ValueError, match="at most 11 tokens, but the longest row needs 17"):
            served(response_source="student", max_new_tokens=10)

    def test_a_token_before_which_there_is_none(self, served):
        def collator(rows):
            ids = torch.tensor([[0, 0, 5, 6], [7, 8, 5, 6]])
            mask, labels = (ids > 0).long(), torch.tensor([[-100, -100, 5, 6], [-100, -100, 5, 6]])
            batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            return batch | {f"teacher_{name}": value for name, value in batch.items()}

        with pytest.raises(ValueError, match="trains on a token that has no token before it"):
            served(data_collator=collator).train()
