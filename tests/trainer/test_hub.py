"""Round trips with the real client, against `hub_server.py` on loopback."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial, partialmethod

import datasets
import httpx2
import huggingface_hub
import peft
import pytest
import torch
import transformers
from datasets import Dataset, load_dataset
from datasets.exceptions import NonMatchingSplitsSizesError
from hub_server import TOKEN, Hub
from paths import ROOT
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import answered_dataset, difference, prompt_dataset, tiny_model, tiny_tokenizer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_promptkd
from trl_promptkd import (
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDConfig,
    PromptKDTrainer,
    TeacherCache,
    build_teacher_cache,
)
from trl_promptkd.generation import store
from trl_promptkd.trainer.checkpoints import checkpoint_to_resume


PROMPT = ["teacher_prompt/adapter_config.json", "teacher_prompt/adapter_model.safetensors"]
WEIGHTS = {"adapter": "adapter_model.safetensors", "full": "model.safetensors"}
STUDENTS = sorted(WEIGHTS)
TEXT = ["Suppose", "you", "are", "a", "student."]  # which the soft prompt starts from
PRIMING = PrimingTemplate("red blue ")
IDS = torch.arange(6, 16)[None]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of its own for each test, to which the client in this process is turned.

    The client reads HF_ENDPOINT and its likes when it is imported, and keeps clients: what it has read is replaced.
    """
    with Hub() as hub:
        constants = huggingface_hub.constants
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # which PEFT reads itself
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it tries again
        yield hub


@pytest.fixture
def models(hub, tmp_path):
    """A student and a teacher with names on the Hub."""
    for name, seed in (("me/start", 1), ("me/teacher", 2)):
        tiny_model(seed=seed).push_to_hub(name)
        tiny_tokenizer().push_to_hub(name)
    return {"model": "me/start", "teacher_model": "me/teacher"}


DIED = (httpx2.TransportError, RuntimeError)  # of which the latter says which of several files it was


@pytest.fixture
def promptkd(make_args):
    def make(models, student="full", dataset=None, eval_dataset=None, prompt=None, **settings):
        return PromptKDTrainer(
            **models,
            args=make_args(**settings),
            train_dataset=dataset or prompt_dataset(),
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4) if student == "adapter" else None,
            prompt_encoder_config=prompt or PromptEncoderConfig(prompt_init="vocab", num_virtual_tokens=3),
        )

    return make


@pytest.fixture
def primed(make_primed_args):
    def make(models, student="full", dataset=None, teacher_cache=None, **settings):
        return PrimedDistillTrainer(
            **models,
            args=make_primed_args(**settings),
            train_dataset=dataset or answered_dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4) if student == "adapter" else None,
            priming=PRIMING,
            teacher_cache=teacher_cache,
        )

    return make


def local_models():
    return {"model": tiny_model(seed=1), "teacher_model": tiny_model(seed=2)}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


def card_of(hub, folder=""):
    return hub.files("me/student")[folder + "README.md"].decode()


def code_of(card):
    return re.findall(r"```python\n(.*?)```", card.split("## How to load")[1], flags=re.DOTALL)[0]


def read(data, tmp_path):
    """The tensors of a file on the Hub."""
    (tmp_path / "file").write_bytes(data)
    return load_file(tmp_path / "file")


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("method", ["promptkd", "primed"])
def test_what_is_loaded_is_what_was_trained(request, hub, models, method, student):
    trainer = request.getfixturevalue(method)(models, student, hub_model_id="me/student")
    trainer.train()
    trainer.push_to_hub()
    assert WEIGHTS[student] in hub.files("me/student")
    if student == "adapter":
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/start"), "me/student")
    else:
        loaded = AutoModelForCausalLM.from_pretrained("me/student")
    trained = logits(trainer.model)
    torch.testing.assert_close(logits(loaded), trained, atol=0, rtol=0)
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/start")), trained)
    assert AutoTokenizer.from_pretrained("me/student").get_vocab() == tiny_tokenizer().get_vocab()
    names = {}
    exec(code_of(card_of(hub)), names)  # says how to load them, and is right
    torch.testing.assert_close(logits(names["student"]), trained, atol=0, rtol=0)
    assert ("prompted_teacher" in names) == (method == "promptkd")
    if method == "promptkd":
        teacher = AutoModelForCausalLM.from_pretrained("me/teacher")
        plain = logits(teacher)
        prompted = logits(PeftModel.from_pretrained(teacher, "me/student", subfolder="teacher_prompt"))
        torch.testing.assert_close(prompted, logits(names["prompted_teacher"]), atol=0, rtol=0)
        wanted = trainer.prompted_teacher_logits(IDS, torch.ones_like(IDS))
        torch.testing.assert_close(prompted[:, -IDS.size(1) :], wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(wanted, plain, atol=1e-2)


class TestDuringTraining:
    @pytest.mark.parametrize("student", STUDENTS)
    @pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
    def test_the_prompt_goes_where_the_student_goes(self, hub, promptkd, tmp_path, strategy, student):
        trainer = promptkd(
            local_models(),
            student,
            push_to_hub=True,
            hub_model_id="me/student",
            hub_strategy=strategy,
            hub_always_push=True,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
        )
        trainer.train()
        files, weights = hub.files("me/student"), WEIGHTS[student]
        places = {
            "end": [],
            "every_save": [""],
            "checkpoint": ["", "last-checkpoint/"],
            "all_checkpoints": ["", "checkpoint-1/", "checkpoint-2/"],
        }[strategy]
        assert {path.removesuffix(weights) for path in files if path.endswith(f"/{weights}") or path == weights} == (
            set(places) | {f"{place}teacher_prompt/" for place in places if student == "adapter"}
        )
        for place in places:
            card = files[f"{place}README.md"].decode()
            assert "2402.12842" in card
            assert "teacher_prompt/" in card
            assert str(tmp_path) not in card
            prompt = read(files[f"{place}teacher_prompt/adapter_model.safetensors"], tmp_path)["prompt_embeddings"]
            assert torch.equal(prompt, trainer.prompt_embeddings()) == (place != "checkpoint-1/")
        trainer.push_to_hub()
        files = hub.files("me/student")
        prompt = read(files["teacher_prompt/adapter_model.safetensors"], tmp_path)["prompt_embeddings"]
        assert torch.equal(prompt, trainer.prompt_embeddings())
        assert not any(path.startswith("checkpoint") for path in files if "all" not in strategy)

    def test_no_checkpoint_goes_while_an_upload_lists_its_files(self, hub, promptkd, tmp_path, monkeypatch):
        """Such an upload failed now and then; what is too old goes before the push, and after those that run."""
        seen, original = [], huggingface_hub.HfApi._prepare_upload_folder_additions

        def list_slowly(*args, **kwargs):
            before = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
            time.sleep(0.5)
            seen.append((before, {path.name for path in (tmp_path / "run").glob("checkpoint-*")}))
            return original(*args, **kwargs)

        monkeypatch.setattr(huggingface_hub.HfApi, "_prepare_upload_folder_additions", list_slowly)
        settings = {"push_to_hub": True, "hub_model_id": "me/student", "hub_strategy": "checkpoint"}
        settings |= {"hub_always_push": True, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
        promptkd(local_models(), "adapter", max_steps=3, **settings).train()
        assert len(seen) == 6
        for index, (before, after) in enumerate(seen):  # student and checkpoint of each step
            step = index // 2 + 1
            assert before <= after
            assert min(before) == f"checkpoint-{step}"

    def test_a_pushed_checkpoint_can_be_resumed_from(self, hub, promptkd, tmp_path, monkeypatch):
        settings = {"push_to_hub": True, "hub_model_id": "me/student", "hub_strategy": "checkpoint"}
        settings |= {"max_steps": 1, "lr_scheduler_type": "constant"}
        pushed, original = [], huggingface_hub.HfApi.upload_folder

        def upload_folder(*args, **kwargs):
            pushed.append(os.listdir(kwargs["folder_path"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
        promptkd(local_models(), save_strategy="steps", save_steps=1, **settings).train()
        assert len(pushed) == 2
        assert "whole_checkpoint.json" in pushed[1]
        assert "checkpoint_is_being_written" not in pushed[1]
        folder = os.path.join(huggingface_hub.snapshot_download("me/student"), "last-checkpoint")
        assert checkpoint_to_resume(folder, str(tmp_path)) == folder
        settings |= {"push_to_hub": False, "max_steps": 2, "output_dir": str(tmp_path / "elsewhere")}
        resumed = promptkd(local_models(), **settings)
        resumed.train(resume_from_checkpoint=folder)
        assert resumed.state.global_step == 2
        whole = promptkd(local_models(), **settings)
        whole.train()
        assert difference(weights(resumed.model), weights(whole.model)) == 0

    def test_response_priming_pushes_too(self, hub, primed, tmp_path):
        settings = {"push_to_hub": True, "hub_model_id": "me/student", "hub_strategy": "checkpoint"}
        trainer = primed(local_models(), "adapter", save_strategy="steps", save_steps=1, **settings)
        trainer.train()
        for place in ("", "last-checkpoint/"):
            card = card_of(hub, place)
            assert "2412.17846" in card
            assert str(tmp_path) not in card
            assert f"{place}adapter_model.safetensors" in hub.files("me/student")

    def test_a_push_is_left_out_while_another_runs(self, hub, promptkd, tmp_path):
        """Files that are being uploaded do not change: prompt and student are of one step."""
        trainer = promptkd(
            local_models(),
            push_to_hub=True,
            hub_model_id="me/student",
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
        )
        go_on, original = threading.Event(), huggingface_hub.HfApi.create_commit

        def slow(*args, **kwargs):
            assert go_on.wait(60)
            return original(*args, **kwargs)

        trainer.add_callback(_At(step=3, call=go_on.set))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface_hub.HfApi, "create_commit", slow)
            trainer.train()
        files, first = hub.files("me/student"), tmp_path / "run" / "checkpoint-1"
        for name in ("model.safetensors", "teacher_prompt/adapter_model.safetensors"):
            assert files[name] == (first / name).read_bytes()

    def test_a_push_that_failed_is_told_of_and_the_next_one_repairs_it(self, hub, promptkd, caplog, propagate):
        trainer = promptkd(
            local_models(), push_to_hub=True, hub_model_id="me/student", save_strategy="steps", save_steps=1
        )
        hub.uploads_left = 1
        trainer.train()
        transformers.utils.hub.hf_api().run_as_future(
            lambda: None
        ).result()  # the jobs before it have said all they have to say
        assert "The push of step 1 to me/student failed" in caplog.text
        assert sorted(hub.files("me/student")) == [".gitattributes"]
        with pytest.raises(DIED):
            trainer.push_to_hub()
        assert sorted(hub.files("me/student")) == [".gitattributes"]
        hub.revive()
        trainer.push_to_hub()
        assert {"model.safetensors", "README.md", *PROMPT} <= set(hub.files("me/student"))

    def test_a_revision_is_made_and_pushed_to(self, hub, models, promptkd):
        settings = {"push_to_hub": True, "hub_model_id": "me/student", "hub_revision": "try/1"}
        trainer = promptkd(models, save_strategy="steps", save_steps=1, **settings)
        trainer.train()
        assert {"model.safetensors", *PROMPT} <= set(hub.files("me/student", branch="try/1"))
        trainer.push_to_hub()
        files = hub.files("me/student", branch="try/1")
        assert sorted(hub.files("me/student")) == [".gitattributes"]
        names = {}
        exec(code_of(files["README.md"].decode()), names)
        torch.testing.assert_close(logits(names["student"]), logits(trainer.model), atol=0, rtol=0)


class _At(transformers.TrainerCallback):
    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


class TestPrivate:
    @pytest.mark.parametrize("during_training", [True, False])
    def test_a_private_repository_is_only_for_those_with_a_token(self, hub, promptkd, monkeypatch, during_training):
        settings = {"push_to_hub": True} if during_training else {}
        trainer = promptkd(
            local_models(), hub_model_id="me/student", hub_private_repo=True, hub_token=TOKEN, **settings
        )
        monkeypatch.delenv("HF_TOKEN")
        trainer.push_to_hub()
        assert hub.repos["models", "me/student"].private
        teacher = tiny_model(seed=2)
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
            PeftModel.from_pretrained(teacher, "me/student", subfolder="teacher_prompt")
        with pytest.raises(OSError, match="me/student is not a local folder"):
            AutoModelForCausalLM.from_pretrained("me/student")
        AutoModelForCausalLM.from_pretrained("me/student", token=TOKEN)
        loaded = PeftModel.from_pretrained(teacher, "me/student", subfolder="teacher_prompt", token=TOKEN)
        assert loaded.peft_config["default"].num_virtual_tokens == 3


class TestKilledUpload:
    @pytest.mark.parametrize("fault", [{"uploads_left": 1}, {"takes_commits": False}])
    def test_nothing_shows_and_it_can_be_repeated(self, hub, promptkd, fault):
        trainer = promptkd(local_models(), "adapter", hub_model_id="me/student")
        vars(hub).update(fault)
        with pytest.raises(DIED):
            trainer.push_to_hub()
        assert hub.dead
        assert sorted(hub.files("me/student")) == [".gitattributes"]
        uploaded = len(hub.repos["models", "me/student"].objects)
        assert uploaded == fault.get("uploads_left", 4)
        hub.revive()
        hub.requests.clear()
        trainer.push_to_hub()
        assert {"adapter_model.safetensors", "README.md", *PROMPT} <= set(hub.files("me/student"))
        again = sum(request.startswith("PUT /lfs/") for request in hub.requests)
        assert again == len(hub.repos["models", "me/student"].objects) - uploaded  # what had arrived is not sent again


class TestCard:
    def test_says_where_everything_comes_from(self, hub, models, promptkd, tmp_path):
        Dataset.from_dict(prompt_dataset().to_dict()).push_to_hub("me/prompts")
        data = load_dataset("me/prompts", split="train")
        trainer = promptkd(
            models, "adapter", dataset=data, eval_dataset=answered_dataset(4), hub_model_id="me/student"
        )
        trainer.train()
        metrics = trainer.evaluate()
        trainer.push_to_hub()
        card = huggingface_hub.ModelCard(card_of(hub))
        assert card.data.base_model == "me/start"
        assert card.data.datasets == "me/prompts"
        assert card.data.library_name == "peft"
        assert card.data.pipeline_tag == "text-generation"
        assert {"trl", "promptkd", "knowledge-distillation", "generated_from_trainer"} <= set(card.data.tags)
        assert card.data.tags == sorted(card.data.tags)
        for part in (
            "[me/start](https://huggingface.co/me/start)",
            "distilled from `me/teacher` behind a soft prompt of 3 virtual",
            "https://huggingface.co/papers/2402.12842",
            "kim2024promptkd",
            "| `num_virtual_tokens` | `3` |",
            "| training  | 8 | `me/prompts` |",
            "| evaluation  | 4 |  |",
            "1 steps of 2 rows each, seed 42.",
            "On the evaluation data, after training",
            f"| `eval_forward_kl` | `{metrics['eval_forward_kl']:.4g}` |",
            f"- trl_promptkd: {trl_promptkd.__version__}\n",
            f"- Transformers: {transformers.__version__}\n",
            f"- Pytorch: {torch.__version__}\n",
            f"- PEFT: {peft.__version__}\n",
            'model="me/student"',
        ):
            assert part in card.text, part
        assert "eval_runtime" not in card.text

    @pytest.mark.parametrize("peft_prompt", [False, True])
    def test_names_no_folder_of_this_machine(self, hub, promptkd, tmp_path, peft_prompt):
        folders = {"model": str(tmp_path / "some" / "start"), "teacher_model": str(tmp_path / "some" / "mentor")}
        for folder in folders.values():
            tiny_model().save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "suppose you are"}
        text |= {"num_virtual_tokens": 3, "tokenizer_name_or_path": folders["teacher_model"]}
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", **text) if peft_prompt else None
        settings = {"push_to_hub": True, "hub_model_id": "me/student", "hub_strategy": "checkpoint"}
        trainer = promptkd(folders, "adapter", prompt=prompt, save_strategy="steps", save_steps=1, **settings)
        trainer.train()
        shutil.rmtree(folders["model"])  # TRL takes what is no folder for a name on the Hub
        trainer.push_to_hub(dataset_name=str(tmp_path / "rows.jsonl"))
        for place in ("", "last-checkpoint/"):
            card = card_of(hub, place)
            assert str(tmp_path) not in card
            assert "base_model:" not in card.split("---")[1]
            assert "fine-tuned version of `start`" in card
            assert "distilled from `mentor`" in card
            assert "None" not in card
            assert 'from_pretrained("<the teacher, mentor>")' in card

    def test_without_a_repository_says_so(self, hub, promptkd, tmp_path):
        promptkd(local_models()).create_model_card("x")
        card = (tmp_path / "run" / "README.md").read_text()
        assert 'model="<this repository>"' in card
        assert "`a model without a name`" in card
        assert "## Evaluation" not in card

    def test_metrics_are_those_of_the_weights_that_are_pushed(self, hub, promptkd):
        """With `load_best_model_at_end`, the best checkpoint's."""
        settings = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 3,
        }
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "rank", "greater_is_better": True}
        trainer = promptkd(local_models(), eval_dataset=answered_dataset(2), hub_model_id="me/student", **settings)
        ranks, original = iter([1.0, 3.0, 2.0]), trainer.evaluation_loop

        def ranked(*args, **kwargs):
            output = original(*args, **kwargs)
            output.metrics["eval_rank"] = next(ranks)
            return output

        trainer.evaluation_loop = ranked
        trainer.train()
        trainer.push_to_hub()
        assert "after step 2" in card_of(hub)
        assert "| `eval_rank` | `3` |" in card_of(hub)

    def test_self_distillation_loads_the_start(self, hub, models, promptkd):
        trainer = promptkd({"model": "me/start", "teacher_model": None}, "adapter", hub_model_id="me/student")
        trainer.push_to_hub()
        assert "the student's own starting weights" in card_of(hub)
        names = {}
        exec(code_of(card_of(hub)), names)
        wanted = trainer.prompted_teacher_logits(IDS, torch.ones_like(IDS))
        torch.testing.assert_close(logits(names["prompted_teacher"])[:, -IDS.size(1) :], wanted, atol=1e-4, rtol=1e-4)


class TestTeacherCache:
    @pytest.fixture
    def build(self, tmp_path, monkeypatch):
        monkeypatch.setattr(store, "BYTES_A_PART", 0)  # a shard for each batch

        def build(rows=6, teacher=None, preset="exact"):
            return build_teacher_cache(
                teacher or tiny_model(seed=2),
                answered_dataset(rows),
                str(tmp_path / "cache"),
                processing_class=tiny_tokenizer(),
                priming=PRIMING,
                preset=preset,
                batch_size=2,
            )

        return build

    def test_is_a_data_set_and_trains(self, hub, build, primed, tmp_path):
        teacher = tiny_model(seed=2)
        teacher.config._name_or_path = "models/mentor"  # a folder, perhaps of another machine
        cache = build(teacher=teacher)
        (tmp_path / "cache" / "_teacher_answers").mkdir()
        (tmp_path / "cache" / "_teacher_answers" / "answers.parquet").touch()  # what the build itself went on from
        cache.push_to_hub("me/cache")
        shards = {shard["file"] for shard in cache.manifest.shards}
        assert len(shards) == 3
        files = {".gitattributes", "README.md", "manifest.json", "basis.safetensors", *shards}
        assert set(hub.files("me/cache", "datasets")) == files
        there = TeacherCache("me/cache")
        assert there.rows.to_list() == cache.rows.to_list()
        torch.testing.assert_close(there.log_probs([0, 3]), cache.log_probs([0, 3]), atol=0, rtol=0)
        assert load_dataset("me/cache", split="train").to_list() == cache.rows.to_list()
        losses = []
        for source in ("me/cache", str(tmp_path / "cache")):
            models = {"model": tiny_model(seed=1)}
            trainer = primed(models, teacher_cache=source, dataset=answered_dataset(6), kd_temperature=1.0)
            losses.append(trainer.train().training_loss)
        assert losses[0] == losses[1]
        card = hub.files("me/cache", "datasets")["README.md"].decode()
        for part in (
            "`mentor`",
            "red blue ",
            "before the question",
            "| `preset` | `exact` |",
            'TeacherCache("me/cache")',
        ):
            assert part in card, part

    def test_other_files_beside_it_are_not_taken_for_rows(self, hub, build):
        build(rows=2).push_to_hub("me/cache")
        for name in ("a.jsonl", "b.jsonl"):  # `datasets` takes the kind of file that there is most of, if nobody says
            huggingface_hub.HfApi().upload_file(
                path_or_fileobj=b'{"a": 1}', path_in_repo=name, repo_id="me/cache", repo_type="dataset"
            )
        assert load_dataset("me/cache", split="train").column_names[0] == "key"

    def test_a_private_one_is_only_for_those_with_a_token(self, hub, build, monkeypatch):
        build().push_to_hub("me/cache", private=True)
        assert hub.repos["datasets", "me/cache"].private
        assert len(TeacherCache("me/cache")) == 6
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", huggingface_hub.constants.HF_HUB_CACHE + "2")
        with pytest.raises(FileNotFoundError, match="neither a folder nor a data set on the Hub that can be reached"):
            TeacherCache("me/cache")

    @pytest.mark.parametrize("fault", [{"uploads_left": 2}, {"takes_commits": False}])
    def test_a_killed_upload_shows_nothing_and_can_be_repeated(self, hub, build, fault):
        cache = build()
        vars(hub).update(fault)
        with pytest.raises(DIED):
            cache.push_to_hub("me/cache")
        assert hub.dead
        hub.revive()
        with pytest.raises(FileNotFoundError, match="no teacher cache"):
            TeacherCache("me/cache")
        cache.push_to_hub("me/cache")
        assert TeacherCache("me/cache").rows.to_list() == cache.rows.to_list()

    @pytest.mark.slow
    def test_a_killed_process_leaves_nothing_and_the_next_one_uploads_all(self, hub, build, tmp_path):
        """Another process, whose client finds the server by HF_ENDPOINT, killed while its shards are on their way."""
        cache = build()
        code = f"from trl_promptkd import TeacherCache; TeacherCache({cache.path!r}).push_to_hub('me/cache')"
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        }
        run = partial(subprocess.Popen, [sys.executable, "-c", code], env={**os.environ, **environment})
        hub.uploads_left = 2
        process = run()
        while not hub.dead:  # after that the client tries again and again
            assert process.poll() is None
            threading.Event().wait(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        hub.revive()
        assert len(hub.repos["datasets", "me/cache"].objects) == 2
        assert sorted(hub.files("me/cache", "datasets")) == [".gitattributes"]
        assert run().wait() == 0
        assert TeacherCache("me/cache").rows.to_list() == cache.rows.to_list()

    def test_is_uploaded_in_one_commit(self, hub, build, monkeypatch):
        """`upload_folder` may make several, and with Xet does so."""
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", None)
        build().push_to_hub("me/cache")
        assert hub.repos["datasets", "me/cache"].messages == ["start", "Upload teacher cache"]

    def test_a_part_of_one_does_not_load_as_a_whole(self, hub, build):
        """As other tools may upload it, file by file."""
        cache = build()
        cache.push_to_hub("me/cache")
        shards = [shard["file"] for shard in cache.manifest.shards]
        huggingface_hub.HfApi().delete_file(shards[0], "me/cache", repo_type="dataset")
        with pytest.raises(FileNotFoundError, match=f"{shards[0]} is missing. Load me/cache again, or push it there"):
            TeacherCache("me/cache")
        with pytest.raises(NonMatchingSplitsSizesError):
            load_dataset("me/cache", split="train")

    def test_shards_of_an_earlier_state_are_removed(self, hub, build, tmp_path):
        build(rows=4).push_to_hub("me/cache")
        shutil.rmtree(tmp_path / "cache")
        cache = build(rows=6, preset="tiny")
        cache.push_to_hub("me/cache")
        assert TeacherCache("me/cache").rows.to_list() == cache.rows.to_list()
        assert len(load_dataset("me/cache", split="train")) == 6
        assert "basis.safetensors" not in hub.files("me/cache", "datasets")


def test_the_pages_code_runs(hub, tmp_path, monkeypatch):
    """Every block of docs/hub.md in its order, with tiny models under the names that it uses."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for name, seed in (("Qwen/Qwen2.5-0.5B-Instruct", 1), ("Qwen/Qwen2.5-7B-Instruct", 2)):
        tiny_model(seed=seed).push_to_hub(name)
        tiny_tokenizer(TEXT).push_to_hub(name)
    get_peft_model(tiny_model(seed=1), LoraConfig(task_type="CAUSAL_LM")).push_to_hub("you/student-adapter")
    prompt_dataset().push_to_hub("trl-lib/ultrafeedback-prompt")
    build_teacher_cache(
        tiny_model(seed=2),
        answered_dataset(),
        "gsm8k-cache",
        processing_class=tiny_tokenizer(TEXT),
        priming="ground_truth",
    )
    short = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 1,
        "save_steps": 1,
    }
    short |= {"per_device_train_batch_size": 2}
    for config in (PromptKDConfig, PrimedDistillConfig):
        original = config.__init__
        monkeypatch.setattr(config, "__init__", partialmethod(_with, original, short))
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 6
    assert names["args"].hub_strategy == "checkpoint"
    assert hub.repos["models", "you/student"].private
    assert len(names["rows"]) == len(names["cache"]) == 8
    names["trainer"].train()


def _with(self, original, settings, **kwargs):
    original(self, **{**kwargs, **settings})
