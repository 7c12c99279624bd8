"""A teacher on vLLM's own server, on its CPU build: `make test-vllm`, in an environment of its own."""

import pytest
import torch
from tiny import save_models, tiny_model, tiny_tokenizer
from trainers import SAVES, SGD, logged, trained_parts
from transformers import TrainerCallback
from vllm_server import POOLING, VLLMServer

from trl_promptkd._trl import is_vllm_available
from trl_promptkd.generation.teacher_server import TeacherServer
from trl_promptkd.models.forward import TokenStates
from trl_promptkd.models.output_head import load_output_head


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_vllm_available(), reason="vLLM is not installed")]
CHUNK, LONGEST = 64, 256  # tokens that vLLM computes at once, and of a row
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
OF_FAMILY = {"llama": {}, "divided (Granite)": {}, "capped (Gemma 2)": {"head_dim": 32, "sliding_window": 64}}


def teacher_model(family="llama"):
    """A model with heads that vLLM's CPU build can do."""
    return tiny_model(family, seed=2, intermediate_size=96, max_position_embeddings=512, **SHAPE, **OF_FAMILY[family])


def serve(folder, log):
    """Hidden states of a folder's model: a context."""
    flags = ("--max-model-len", str(LONGEST), "--max-num-batched-tokens", str(CHUNK))
    return VLLMServer(folder, log, *POOLING, *flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    save_models(path, teacher=teacher_model())
    return path / "teacher"


@pytest.fixture(scope="module")
def server(folder):
    with serve(folder, folder.parent / "log") as running:
        yield running


def states_of(model, row):
    with torch.no_grad():
        return model.get_decoder()(torch.tensor([row])).last_hidden_state[0]


def random_row(length, seed):
    return torch.randint(6, 32, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


LONG = random_row(250, 0)  # four times what is computed at once
ROWS = {
    "short ones": [random_row(7, 1), random_row(2, 2), [9]],
    "longer than what is computed at once": [LONG],
    "with the same beginning": [LONG[:200] + random_row(5, 3), LONG[:100], LONG[:200] + random_row(9, 4)],
    "twice, and of all lengths": [LONG, random_row(3, 5), LONG, *(random_row(10 * n, n) for n in range(1, 20))],
}


class TestStates:
    @pytest.mark.parametrize("name", ROWS)
    def test_are_those_of_transformers(self, server, name):
        client, model = TeacherServer(server.host, dtype="float32"), teacher_model()
        for _ in range(2):  # the second time, vLLM has seen these prefixes
            found = client.states(ROWS[name])
            for row, states in zip(ROWS[name], found, strict=True):
                expected = states_of(model, row)
                assert float((states - expected).norm()) < 1e-5 * float(expected.norm())

    def test_of_rows_that_are_asked_for_together(self, server):
        client, model = TeacherServer(server.host, dtype="float32"), teacher_model()
        pending = [(row, client.submit([row])) for row in ROWS["twice, and of all lengths"]]
        for row, states in pending:
            expected = states_of(model, row)
            assert float((states.result()[0] - expected).norm()) < 1e-5 * float(expected.norm())

    @pytest.mark.parametrize("family", [family for family in OF_FAMILY if family != "llama"])
    def test_and_the_head_make_the_models_logits(self, family, tmp_path):
        """Also if these are scaled or capped: that is the head's part."""
        model = teacher_model(family)
        save_models(tmp_path, teacher=model)
        with serve(tmp_path / "teacher", tmp_path / "log") as server:
            head = load_output_head(str(tmp_path / "teacher"))
            client = TeacherServer(server.host, dtype="float32")
            client.check(head, tiny_tokenizer(), LONGEST - 1)
            (states,) = client.states([LONG])
            with torch.no_grad():
                expected = model(torch.tensor([LONG])).logits[0].log_softmax(dim=-1)
        found = TokenStates(states, head).logits().log_softmax(dim=-1)
        kl = float((expected.exp() * (expected - found)).sum(dim=-1).mean())
        print(f"{family}: KL {kl:.1e} nats, log-probabilities are off by {float((found - expected).abs().max()):.1e}")
        assert kl < 1e-5

    def test_too_long_a_row_is_refused(self, server, folder):
        client = TeacherServer(server.host)
        """A row of the whole length would wait for ever if it is computed in chunks."""
        with pytest.raises(ValueError, match=r"status 400: .*maximum context length is 256"):
            client.states([[9] * (LONGEST + 1)])
        with pytest.raises(ValueError, match="rows of at most 255 tokens, but the longest row needs 256"):
            client.check(load_output_head(str(folder)), tiny_tokenizer(), LONGEST)
        assert client.states([[9] * (LONGEST - 1)])[0].shape == (LONGEST - 1, 64)

    def test_another_model_is_refused(self, server):
        with pytest.raises(ValueError, match="but `teacher_model` is 'other'"):
            TeacherServer(server.host, "other").states([[9]])


SETTINGS = {"max_steps": 6, "gradient_accumulation_steps": 2, **SGD}


class Kill(TrainerCallback):
    """Kills the server when a step is half done."""

    def __init__(self, server, step):
        self.server, self.step = server, step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.server.kill()


class TestTraining:
    @pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 2e-3)])
    @pytest.mark.parametrize(
        ("kd_beta", "kd_temperature", "source"),
        [(0.0, 1.0, "dataset"), (0.5, 5.942, "student"), (1.0, 1.0, "dataset")],
    )
    def test_is_as_with_the_teacher_beside_the_student(
        self, primed, server, folder, dtype, bound, kd_beta, kd_temperature, source
    ):
        settings = {"kd_beta": kd_beta, "kd_temperature": kd_temperature, "response_source": source, **SETTINGS}
        settings["generation_kwargs"] = {"do_sample": False}
        live = primed(teacher_model=teacher_model(), **settings)
        served = primed(teacher_model=str(folder), teacher_server=server.host, teacher_server_dtype=dtype, **settings)
        live.train()
        served.train()
        for name in ("loss", "kd", "kl/student_teacher", "entropy/teacher", "grad_norm"):
            assert logged(served, name) == pytest.approx(logged(live, name), rel=bound, abs=1e-6), name
        expected, found = trained_parts(live), trained_parts(served)
        worst = max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)
        print(f"{dtype}, kd_beta {kd_beta}, temperature {kd_temperature}, {source}: weights are off by {worst:.1e}")
        assert worst < bound

    def test_resumes_after_the_server_was_killed(self, primed, folder, tmp_path):
        settings = {"teacher_model": str(folder), "teacher_server_dtype": "float32", **SETTINGS, **SAVES}
        with serve(folder, tmp_path / "log") as server:
            whole = primed(teacher_server=server.host, output_dir=str(tmp_path / "whole"), **settings)
            whole.train()
            broken = primed(teacher_server=server.host, callbacks=[Kill(server, 3)], **settings)
            with pytest.raises(ConnectionError, match="did not answer /pooling"):
                broken.train()
        assert broken.state.global_step in (3, 4)  # what was under way may have come still
        with serve(folder, tmp_path / "log") as server:
            resumed = primed(teacher_server=server.host, **settings)
            resumed.train(resume_from_checkpoint=True)
        expected = trained_parts(whole)
        for name, value in trained_parts(resumed).items():
            assert float((value - expected[name]).norm()) < 1e-5 * float(expected[name].norm()), name
