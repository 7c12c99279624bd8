import json
import logging
import os
import shutil
import signal

import pytest
from trainers import SAVES, equal, trained, trained_parts
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from trl_promptkd.trainer.checkpoints import checkpoint_to_resume


LIST = "whole_checkpoint.json"


@pytest.fixture
def run(make):
    """Makes a trainer of three steps with a checkpoint after each."""
    return lambda **settings: make(**{**SAVES, "max_steps": 3, **settings})


def fake_checkpoint(run_dir, step, whole=True):
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("abc")
    if whole:
        (folder / LIST).write_text(json.dumps({"files": {"weights": 3}}))
    return folder


def unfinished(folder):
    (folder / "checkpoint_is_being_written").touch()
    return folder


class TestCheckpointToResume:
    @pytest.mark.parametrize("nothing", [None, False])
    def test_none_where_none_is_asked_for(self, nothing, tmp_path):
        assert checkpoint_to_resume(nothing, str(tmp_path)) is None

    def test_newest_by_number(self, tmp_path):
        for step in (9, 10, 2):
            fake_checkpoint(tmp_path, step)
        (tmp_path / "checkpoint-99x").mkdir()
        assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-10")

    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (unfinished, "it was being written when its run ended"),
            (lambda folder: (folder / LIST).write_text("[]"), f"its {LIST} cannot be read"),
            (lambda folder: (folder / LIST).write_text('{"files": {"wei'), f"its {LIST} cannot be read"),
            (lambda folder: (folder / "weights").unlink(), "weights is missing"),
            (lambda folder: (folder / "weights").write_text("a"), "weights has 1 bytes instead of 3"),
        ],
        ids=["unfinished", "no_list", "half_a_list", "missing_file", "shorter_file"],
    )
    def test_what_is_not_whole_is_skipped_with_a_word(self, damage, why, tmp_path, caplog, propagate):
        whole, broken = fake_checkpoint(tmp_path, 3), fake_checkpoint(tmp_path, 4)
        damage(broken)
        with caplog.at_level(logging.WARNING):
            assert checkpoint_to_resume(True, str(tmp_path)) == str(whole)
        assert f"{broken} is not whole and is skipped: {why}" in caplog.text
        with pytest.raises(ValueError, match=f"not a whole checkpoint: {why}"):
            checkpoint_to_resume(str(broken), str(tmp_path / "another run"))

    def test_without_a_list_it_is_taken_on_the_users_word_only(self, tmp_path, caplog, propagate):
        """Another trainer's, say."""
        whole, foreign = fake_checkpoint(tmp_path, 3), fake_checkpoint(tmp_path, 4, whole=False)
        with caplog.at_level(logging.WARNING):
            assert checkpoint_to_resume(True, str(tmp_path)) == str(whole)
            assert checkpoint_to_resume(foreign, str(tmp_path)) == str(foreign)
        assert f"{foreign} is not whole and is skipped: it has no {LIST}" in caplog.text
        assert f"{foreign} cannot be checked: it has no {LIST}" in caplog.text

    @pytest.mark.parametrize("by_name", [True, False])
    def test_a_run_that_was_killed_before_its_first_whole_one_starts_afresh(
        self, by_name, tmp_path, caplog, propagate
    ):
        """Also where `transformers.trainer_utils.get_last_checkpoint` named the folder."""
        for step in (1, 2):
            unfinished(fake_checkpoint(tmp_path, step, whole=False))
        (tmp_path / "checkpoint-3").mkdir()
        resume = get_last_checkpoint(str(tmp_path)) if by_name else True
        with caplog.at_level(logging.WARNING):
            assert checkpoint_to_resume(resume, str(tmp_path)) is None
        assert caplog.text.count("was being written when its run ended") == 3
        assert "Training starts afresh" in caplog.text

    def test_an_unfinished_one_of_this_run_is_skipped_by_name_too(self, tmp_path):
        whole = fake_checkpoint(tmp_path, 3)
        unfinished(fake_checkpoint(tmp_path, 4, whole=False))
        assert checkpoint_to_resume(get_last_checkpoint(str(tmp_path)), str(tmp_path)) == str(whole)

    def test_none_is_whole(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds no whole checkpoint\. Start without it"):
            checkpoint_to_resume(True, str(tmp_path / "nowhere"))
        fake_checkpoint(tmp_path, 1, whole=False)
        with pytest.raises(ValueError, match=r"no whole checkpoint \(1 that are not\)"):
            checkpoint_to_resume(True, str(tmp_path))
        with pytest.raises(FileNotFoundError, match="checkpoint-7', which is not a folder"):
            checkpoint_to_resume(str(tmp_path / "checkpoint-7"), str(tmp_path))


@pytest.mark.parametrize("by_name", [True, False])
def test_weights_alone_cannot_be_resumed_from(run, by_name, tmp_path):
    """Not with a new optimizer either, which transformers would take without a word."""
    run(save_only_model=True).train()
    resume = str(tmp_path / "run" / "checkpoint-2") if by_name else True
    message = r"checkpoint-[23] was saved with `save_only_model=True`, which leaves out the"
    with pytest.raises(ValueError, match=message):
        run(max_steps=4).train(resume_from_checkpoint=resume)


class TestKilledWhileSaving:
    """The process dies within the saving of step 2; deaths at random moments are in test_crashes.py."""

    @pytest.mark.parametrize("moment", ["_save", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"])
    def test_the_one_before_resumes_to_the_same_weights(self, run, moment, monkeypatch, caplog, propagate):
        straight = run()
        expected, run_dir = trained(straight), straight.args.output_dir
        shutil.rmtree(run_dir)

        class Killed(BaseException):
            pass

        trainer = run()
        original = getattr(trainer, moment)

        def killed(*args, **kwargs):
            original(*args, **kwargs)
            if trainer.state.global_step == 2:
                raise Killed

        monkeypatch.setattr(trainer, moment, killed)
        with pytest.raises(Killed):
            trainer.train()
        assert os.path.isdir(f"{run_dir}/checkpoint-2")
        trainer = run()
        with caplog.at_level(logging.WARNING):
            trainer.train(resume_from_checkpoint=True)
        assert "checkpoint-2 is not whole and is skipped" in caplog.text
        assert equal(trained_parts(trainer), expected)

    def test_old_ones_go_only_when_the_new_one_is_whole(self, run, tmp_path, monkeypatch):
        trainer = run(save_total_limit=1)
        run_dir = trainer.args.output_dir
        # What a killed run left behind, and of a higher number
        unfinished(fake_checkpoint(tmp_path / "run", 8, whole=False))
        there = []
        original = trainer._save_rng_state

        def look(folder):
            there.append({name for name in os.listdir(run_dir) if name.startswith("checkpoint")})
            original(folder)

        monkeypatch.setattr(trainer, "_save_rng_state", look)
        trainer.train()
        assert there == [
            {"checkpoint-8", "checkpoint-1"},
            {"checkpoint-1", "checkpoint-2"},
            {"checkpoint-2", "checkpoint-3"},
        ]
        assert [name for name in os.listdir(run_dir) if name.startswith("checkpoint")] == ["checkpoint-3"]
        assert checkpoint_to_resume(True, run_dir).endswith("checkpoint-3")
        assert trainer.args.save_total_limit == 1

    def test_writing_anew_over_a_whole_one(self, run, monkeypatch):
        """From an older checkpoint on, the newer ones are written over: half of both is not whole."""
        run().train()
        trainer = run()
        run_dir = trainer.args.output_dir

        def killed(folder):
            raise KeyboardInterrupt

        monkeypatch.setattr(trainer, "_save_rng_state", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=f"{run_dir}/checkpoint-1")
        assert checkpoint_to_resume(f"{run_dir}/checkpoint-2", run_dir) == f"{run_dir}/checkpoint-1"


def test_a_run_that_was_killed_after_its_last_step_trains_no_further(run):
    """transformers would take one step more wherever the last epoch is not whole."""
    expected = trained(run(lr_scheduler_type="constant"))
    trainer = run(lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert equal(trained_parts(trainer), expected)


class Signal(TrainerCallback):
    """A SIGTERM within step 2."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class TestSaveOnInterrupt:
    def test_the_step_is_finished_and_saved_and_the_run_goes_on(self, run, caplog, propagate):
        expected = trained(run(save_strategy="no"))
        before = signal.getsignal(signal.SIGTERM)
        trainer = run(save_strategy="no", save_on_interrupt=True, callbacks=[Signal()])
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert "SIGTERM: a checkpoint is saved after step 2" in caplog.text
        assert trainer.state.global_step == 2
        assert signal.getsignal(signal.SIGTERM) == before
        trainer = run(save_strategy="no")
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3
        assert equal(trained_parts(trainer), expected)

    def test_a_training_that_fails_gives_the_signal_back(self, run, monkeypatch):
        before = signal.getsignal(signal.SIGTERM)
        trainer = run(save_on_interrupt=True)
        callbacks = len(trainer.callback_handler.callbacks)

        def fail(*args, **kwargs):
            assert signal.getsignal(signal.SIGTERM) != before
            raise FloatingPointError

        monkeypatch.setattr(trainer, "compute_loss", fail)
        with pytest.raises(FloatingPointError):
            trainer.train()
        assert signal.getsignal(signal.SIGTERM) == before
        assert len(trainer.callback_handler.callbacks) == callbacks

    def test_a_signal_after_the_last_step_is_not_lost(self, run):
        class AtTheEnd(TrainerCallback):
            def on_train_end(self, args, state, control, **kwargs):
                os.kill(os.getpid(), signal.SIGTERM)

        caught = []
        before = signal.signal(signal.SIGTERM, lambda *args: caught.append(args))
        try:
            run(save_on_interrupt=True, callbacks=[AtTheEnd()]).train()
        finally:
            signal.signal(signal.SIGTERM, before)
        assert len(caught) == 1
