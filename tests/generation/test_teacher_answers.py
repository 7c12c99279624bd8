import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from reference import greedy
from tiny import prompt_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from trl_promptkd import PrimingTemplate
from trl_promptkd.data.primed import tokenize_primed_dataset
from trl_promptkd.files import content_hash
from trl_promptkd.generation import progress, store, teacher_answers
from trl_promptkd.generation.teacher_answers import weights_fingerprint, write_teacher_answers


ARGS = SimpleNamespace(
    seed=1,
    rollout_batch_size=2,
    disable_tqdm=False,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    gradient_checkpointing_kwargs=None,
)


def rows(size=7, text="red "):
    return tokenize_primed_dataset(prompt_dataset(size), "x", tiny_tokenizer(), PrimingTemplate(text))


@pytest.fixture
def write(tmp_path):
    def write(dataset, teacher=None, folder="answers", do_sample=False, **settings):
        config = GenerationConfig(max_new_tokens=5, do_sample=do_sample, pad_token_id=0, eos_token_id=0)
        return write_teacher_answers(
            dataset,
            str(tmp_path / folder),
            teacher or tiny_model(seed=2),
            weights_fingerprint(teacher or tiny_model(seed=2)),
            Accelerator(cpu=True),
            tiny_tokenizer(),
            config,
            SimpleNamespace(**{**vars(ARGS), **settings}),
        )

    return write


@pytest.fixture
def counted(monkeypatch):
    """How many prompts were answered."""
    counts, original = [], teacher_answers.sample_completions

    def sample(model, accelerator, prompts, *args, **kwargs):
        counts.append(len(prompts))
        return original(model, accelerator, prompts, *args, **kwargs)

    monkeypatch.setattr(teacher_answers, "sample_completions", sample)
    return counts


class TestWriting:
    def test_answers_are_the_primed_teachers_in_the_order_of_the_rows(self, write):
        teacher = tiny_model(seed=2)
        answered = write(rows(), teacher)
        for before, after in zip(rows(), answered, strict=True):
            assert after["completion_ids"] == greedy(teacher, before["teacher_prompt_ids"], 5, 0)
            assert after["length"] == len(after["teacher_prompt_ids"]) + len(after["completion_ids"])
            assert after["prompt_ids"] == before["prompt_ids"]

    def test_are_a_data_set(self, write, tmp_path):
        write(rows())
        stored = load_dataset(
            "parquet", data_files=str(tmp_path / "answers" / "*.parquet"), split="train", cache_dir=str(tmp_path / "c")
        )
        assert set(stored.column_names) == {"key", "prompt", "completion", "completion_ids"}
        assert len(stored) == 7
        assert all(row["prompt"].startswith("red ") for row in stored)

    def test_equal_prompts_are_answered_once(self, write, counted):
        dataset = rows(3)
        twice = dataset.select([0, 1, 2, 0, 1])
        answers = write(twice)["completion_ids"]
        assert sum(counted) == 3
        assert answers[:2] == answers[3:]

    def test_sampled_answers_do_not_depend_on_the_order_of_the_rows(self, write):
        dataset = rows()
        first = write(dataset, folder="a", do_sample=True)["completion_ids"]
        turned = write(dataset.select(range(6, -1, -1)), folder="b", do_sample=True)["completion_ids"]
        assert turned[::-1] == first


class TestResuming:
    def test_what_is_there_is_not_written_again(self, write, counted, caplog, propagate):
        first = write(rows(4))
        more = write(rows(7))
        assert counted == [2, 2, 2, 1]
        assert more["completion_ids"][:4] == first["completion_ids"]
        assert "Teacher answers for train_dataset: 4 of 7" in caplog.text
        write(rows(7))
        assert sum(counted) == 7

    def test_a_killed_run_goes_on_where_it_was(self, write, counted, monkeypatch, tmp_path):
        """Killed after every batch in turn; in the end the answers are those of an undisturbed run."""
        monkeypatch.setattr(store, "SECONDS_A_PART", 0.0)
        whole = write(rows(), folder="whole", do_sample=True)["completion_ids"]
        counted.clear()
        original = teacher_answers.write_part

        def die(*args):
            original(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(teacher_answers, "write_part", die)
            for _ in range(4):
                with pytest.raises(KeyboardInterrupt):
                    write(rows(), do_sample=True)
        assert write(rows(), do_sample=True)["completion_ids"] == whole
        assert sum(counted) == 7

    @pytest.mark.parametrize("change", ["teacher", "priming", "sampling", "seed"])
    def test_what_made_them_is_part_of_their_name(self, write, counted, change):
        write(rows(3))
        write(
            rows(3, "blue " if change == "priming" else "red "),
            tiny_model(seed=3 if change == "teacher" else 2),
            do_sample=change == "sampling",
            seed=2 if change == "seed" else 1,
        )
        assert sum(counted) == 6


def test_a_key_is_the_same_in_every_version():
    """A hash of the settings and the prompt, in ASCII: answers that were written before are found."""
    assert content_hash([{"stop": "ü"}, [1, 2]], ensure_ascii=True, default=str) == "60c3061af104c7745e9cf2d0a2801a29"
    with pytest.raises(TypeError):
        content_hash([{1, 2}])


class TestFingerprint:
    def test_weights_shapes_and_types_tell_models_apart_and_copies_not(self):
        kinds = [{}, {"seed": 2}, {"seed": 3}, {"tie_word_embeddings": True}, {"dtype": torch.bfloat16}]
        for trained in (False, True):
            prints = [weights_fingerprint(tiny_model(**kind).requires_grad_(trained)) for kind in [*kinds, kinds[0]]]
            assert len(set(prints)) == 5
            assert prints[-1] == prints[0]

    @pytest.mark.parametrize("place", [0, 1, 777, -1])
    def test_any_entry_counts(self, place):
        model = tiny_model()
        with torch.no_grad():
            before = weights_fingerprint(model.requires_grad_(False))
            for name, parameter in model.named_parameters():
                flat = parameter.view(-1)
                place_here = place if place < len(flat) else 1
                value = flat[place_here].clone()
                flat[place_here] += 1e-3
                assert weights_fingerprint(model) != before, name
                flat[place_here] = value
                assert weights_fingerprint(model) == before, name

    def test_buffers_count(self):
        model = tiny_model().requires_grad_(False)
        model.register_buffer("scale", torch.ones(3))
        before = weights_fingerprint(model)
        model.scale[1] = 2.0
        assert weights_fingerprint(model) != before

    def test_the_scales_of_quantized_weights_count(self, tmp_path):
        pytest.importorskip("bitsandbytes")
        tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
        for bits in ("load_in_4bit", "load_in_8bit"):
            model = AutoModelForCausalLM.from_pretrained(
                tmp_path, quantization_config=BitsAndBytesConfig(**{bits: True})
            )
            before = weights_fingerprint(model)
            weight = model.model.layers[0].mlp.up_proj.weight
            (weight.quant_state.absmax if bits == "load_in_4bit" else weight.SCB)[:1] *= 2
            assert weights_fingerprint(model) != before, bits

    def test_an_adapter_above_the_teacher_does_not_count(self):
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            models.append(get_peft_model(tiny_model(seed=2), LoraConfig(task_type="CAUSAL_LM")))
            torch.nn.init.normal_(next(p for p in models[-1].parameters() if p.requires_grad))
        assert weights_fingerprint(models[0]) == weights_fingerprint(models[1])


class TestProgress:
    def test_answers_count_when_they_end_and_not_when_their_batch_does(self, write, monkeypatch, capsys):
        """A batch takes minutes."""
        monkeypatch.setattr(progress, "_DELAY", 0)
        monkeypatch.setattr(progress, "_INTERVAL", 0)
        monkeypatch.setattr(progress, "_IN_FILES", 0)
        whole = {"rollout_batch_size": 7, "do_sample": True}
        lengths = list(map(len, write(rows(), **whole)["completion_ids"]))
        early = sum(length < max(lengths) for length in lengths)
        shown = re.findall(r"answers for train_dataset: (\d+)/7 rows", capsys.readouterr().err)
        assert 0 < early < 7
        assert {"0", str(early), "7"} <= set(shown)
        write(rows(), folder="silent", disable_tqdm=True, **whole)
        assert "answers for" not in capsys.readouterr().err
