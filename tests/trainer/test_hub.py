"""Round trips with the real client, against `hub_server.py` on loopback."""

import os
import re
import shutil
import threading
from functools import partialmethod

import huggingface_hub
import peft
import pytest
import torch
import transformers
from datasets import Dataset, load_dataset
from hub_server import DIED, TOKEN
from paths import ROOT
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load as tensors_of
from tiny import answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from trainers import BEST, METHODS, SAVES, equal, lora, tiny_teacher, trained, trained_parts
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer import base_trainer

import trl_promptkd
from trl_promptkd import build_teacher_cache
from trl_promptkd.trainer.checkpoints import checkpoint_to_resume


pytest_plugins = ["hub_client"]
PROMPT = ["teacher_prompt/adapter_config.json", "teacher_prompt/adapter_model.safetensors"]
WEIGHTS = {"adapter": "adapter_model.safetensors", "full": "model.safetensors"}
STUDENTS = sorted(WEIGHTS)
PUSHES = {"push_to_hub": True, "hub_model_id": "me/student"}
TEXT = ["Suppose", "you", "are", "a", "student."]  # which the soft prompt starts from
IDS = torch.arange(6, 16)[None]


@pytest.fixture
def names(hub):
    """Those of a student and a teacher on the Hub."""
    for name, seed in (("me/start", 1), ("me/teacher", 2)):
        tiny_model(seed=seed).push_to_hub(name)
        tiny_tokenizer().push_to_hub(name)
    return {"model": "me/start", "teacher_model": "me/teacher"}


def peft_of(student):
    return lora() if student == "adapter" else None


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


def card_of(hub, folder=""):
    return hub.files("me/student")[folder + "README.md"].decode()


def run_code_of(card):
    """What the code in a card defines."""
    names = {}
    exec(re.findall(r"```python\n(.*?)```", card.split("## How to load")[1], flags=re.DOTALL)[0], names)
    return names


def prompt_in(files, place=""):
    return tensors_of(files[f"{place}teacher_prompt/adapter_model.safetensors"])["prompt_embeddings"]


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or {"atol": 0, "rtol": 0}))


@pytest.mark.parametrize("student", STUDENTS)
def test_what_is_loaded_is_what_was_trained(hub, names, make, student):
    trainer = make(**names, peft_config=peft_of(student), hub_model_id="me/student")
    trainer.train()
    trainer.push_to_hub()
    assert WEIGHTS[student] in hub.files("me/student")
    if student == "adapter":
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/start"), "me/student")
    else:
        loaded = AutoModelForCausalLM.from_pretrained("me/student")
    of_trained = logits(trainer.model)
    same(logits(loaded), of_trained)
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/start")), of_trained)
    assert AutoTokenizer.from_pretrained("me/student").get_vocab() == tiny_tokenizer().get_vocab()
    defined = run_code_of(card_of(hub))  # says how to load them, and is right
    same(logits(defined["student"]), of_trained)
    assert ("prompted_teacher" in defined) == (make.method == "promptkd")
    if make.method == "promptkd":
        teacher = AutoModelForCausalLM.from_pretrained("me/teacher")
        plain = logits(teacher)
        prompted = logits(PeftModel.from_pretrained(teacher, "me/student", subfolder="teacher_prompt"))
        same(prompted, logits(defined["prompted_teacher"]))
        wanted = trainer.prompted_teacher_logits(IDS, torch.ones_like(IDS))
        same(prompted[:, -IDS.size(1) :], wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(wanted, plain, atol=1e-2)


class TestDuringTraining:
    @pytest.mark.parametrize("student", STUDENTS)
    @pytest.mark.parametrize(
        ("strategy", "places"),
        [
            ("end", []),
            ("every_save", [""]),
            ("checkpoint", ["", "last-checkpoint/"]),
            ("all_checkpoints", ["", "checkpoint-1/", "checkpoint-2/"]),
        ],
    )
    def test_the_prompt_goes_where_the_student_goes(self, hub, promptkd, tmp_path, strategy, places, student):
        settings = {"hub_strategy": strategy, "hub_always_push": True, "max_steps": 2, "save_total_limit": 1}
        trainer = promptkd(peft_config=peft_of(student), **settings, **PUSHES, **SAVES)
        trainer.train()
        files, weights = hub.files("me/student"), WEIGHTS[student]
        assert {path.removesuffix(weights) for path in files if path.endswith(f"/{weights}") or path == weights} == (
            set(places) | {f"{place}teacher_prompt/" for place in places if student == "adapter"}
        )
        for place in places:
            card = files[f"{place}README.md"].decode()
            assert "2402.12842" in card
            assert "teacher_prompt/" in card
            assert str(tmp_path) not in card
            assert torch.equal(prompt_in(files, place), trainer.prompt_embeddings()) == (place != "checkpoint-1/")
        trainer.push_to_hub()
        files = hub.files("me/student")
        assert torch.equal(prompt_in(files), trainer.prompt_embeddings())
        assert not any(path.startswith("checkpoint") for path in files if "all" not in strategy)

    def test_no_checkpoint_goes_while_an_upload_lists_its_files(self, hub, promptkd, tmp_path, monkeypatch):
        """Such an upload failed now and then; what is too old goes before the push, and after those that run."""
        seen, original = [], huggingface_hub.HfApi._prepare_upload_folder_additions

        def list_slowly(*args, **kwargs):
            before = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
            threading.Event().wait(0.2)  # `time.sleep` does nothing here
            seen.append((before, {path.name for path in (tmp_path / "run").glob("checkpoint-*")}))
            return original(*args, **kwargs)

        monkeypatch.setattr(huggingface_hub.HfApi, "_prepare_upload_folder_additions", list_slowly)
        settings = {"hub_strategy": "checkpoint", "hub_always_push": True, "save_total_limit": 1, "max_steps": 3}
        promptkd(peft_config=lora(), **settings, **PUSHES, **SAVES).train()
        assert len(seen) == 6
        for index, (before, after) in enumerate(seen):  # student and checkpoint of each step
            step = index // 2 + 1
            assert before <= after
            assert min(before) == f"checkpoint-{step}"

    def test_a_pushed_checkpoint_can_be_resumed_from(self, hub, promptkd, tmp_path, monkeypatch):
        pushed, original = [], huggingface_hub.HfApi.upload_folder

        def upload_folder(*args, **kwargs):
            pushed.append(os.listdir(kwargs["folder_path"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
        constant = {"lr_scheduler_type": "constant"}
        promptkd(hub_strategy="checkpoint", **constant, **PUSHES, **SAVES).train()
        assert len(pushed) == 2
        assert "whole_checkpoint.json" in pushed[1]
        assert "checkpoint_is_being_written" not in pushed[1]
        folder = os.path.join(huggingface_hub.snapshot_download("me/student"), "last-checkpoint")
        assert checkpoint_to_resume(folder, str(tmp_path)) == folder
        resumed = promptkd(max_steps=2, output_dir=str(tmp_path / "elsewhere"), **constant)
        resumed.train(resume_from_checkpoint=folder)
        assert resumed.state.global_step == 2
        assert equal(trained_parts(resumed), trained(promptkd(max_steps=2, **constant)))

    def test_response_priming_pushes_too(self, hub, primed, tmp_path):
        primed(peft_config=lora(), hub_strategy="checkpoint", **PUSHES, **SAVES).train()
        for place in ("", "last-checkpoint/"):
            card = card_of(hub, place)
            assert "2412.17846" in card
            assert str(tmp_path) not in card
            assert f"{place}adapter_model.safetensors" in hub.files("me/student")

    def test_a_push_is_left_out_while_another_runs(self, hub, promptkd, tmp_path):
        """Files that are being uploaded do not change: prompt and student are of one step."""
        trainer = promptkd(max_steps=3, **PUSHES, **SAVES)
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
        trainer = promptkd(**PUSHES, **SAVES)
        hub.uploads_left = 1
        trainer.train()
        # The jobs before this one have then said all they have to say
        transformers.utils.hub.hf_api().run_as_future(lambda: None).result()
        assert "The push of step 1 to me/student failed" in caplog.text
        assert sorted(hub.files("me/student")) == [".gitattributes"]
        with pytest.raises(DIED):
            trainer.push_to_hub()
        assert sorted(hub.files("me/student")) == [".gitattributes"]
        hub.revive()
        trainer.push_to_hub()
        assert {"model.safetensors", "README.md", *PROMPT} <= set(hub.files("me/student"))

    def test_a_revision_is_made_and_pushed_to(self, hub, names, promptkd):
        trainer = promptkd(**names, hub_revision="try/1", **PUSHES, **SAVES)
        trainer.train()
        assert {"model.safetensors", *PROMPT} <= set(hub.files("me/student", branch="try/1"))
        trainer.push_to_hub()
        files = hub.files("me/student", branch="try/1")
        assert sorted(hub.files("me/student")) == [".gitattributes"]
        same(logits(run_code_of(files["README.md"].decode())["student"]), logits(trainer.model))


class _At(transformers.TrainerCallback):
    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


class TestPrivate:
    @pytest.mark.parametrize("during_training", [True, False])
    def test_a_private_repository_is_only_for_those_with_a_token(self, hub, promptkd, monkeypatch, during_training):
        settings = {"hub_model_id": "me/student", "hub_private_repo": True, "hub_token": TOKEN}
        trainer = promptkd(push_to_hub=during_training, **settings)
        monkeypatch.delenv("HF_TOKEN")
        trainer.push_to_hub()
        assert hub.repos["models", "me/student"].private
        teacher = tiny_teacher()
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
            PeftModel.from_pretrained(teacher, "me/student", subfolder="teacher_prompt")
        with pytest.raises(OSError, match="me/student is not a local folder"):
            AutoModelForCausalLM.from_pretrained("me/student")
        AutoModelForCausalLM.from_pretrained("me/student", token=TOKEN)
        loaded = PeftModel.from_pretrained(teacher, "me/student", subfolder="teacher_prompt", token=TOKEN)
        assert loaded.peft_config["default"].num_virtual_tokens == 7


class TestKilledUpload:
    @pytest.mark.parametrize("fault", [{"uploads_left": 1}, {"takes_commits": False}])
    def test_nothing_shows_and_it_can_be_repeated(self, hub, promptkd, fault):
        trainer = promptkd(peft_config=lora(), hub_model_id="me/student")
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


class TestSamples:
    """As docs/hub.md warns."""

    @pytest.mark.parametrize("settings", [PUSHES, {}])
    def test_are_pushed_unless_their_folder_is_deleted(self, hub, promptkd, tmp_path, settings):
        trainer = promptkd(log_completions=True, **{"hub_model_id": "me/student", **settings})
        trainer.train()
        if not settings:
            shutil.rmtree(tmp_path / "run" / "completions")
        trainer.push_to_hub()
        assert any("completions" in name for name in hub.files("me/student")) == bool(settings)


class TestCard:
    def test_says_where_everything_comes_from(self, hub, names, promptkd):
        Dataset.from_dict(prompt_dataset().to_dict()).push_to_hub("me/prompts")
        data = load_dataset("me/prompts", split="train")
        parts = {"train_dataset": data, "eval_dataset": answered_dataset(4), "peft_config": lora()}
        trainer = promptkd(**names, **parts, hub_model_id="me/student")
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
            "distilled from [me/teacher](https://huggingface.co/me/teacher) with a soft prompt of 7 virtual",
            "https://huggingface.co/papers/2402.12842",
            "kim2024promptkd",
            "| `num_virtual_tokens` | `7` |",
            "- Training: 8 rows of [me/prompts](https://huggingface.co/datasets/me/prompts)\n",
            "- Evaluation: 4 rows\n",
            "- 1 step of 2 rows, seed 42\n",
            "On the evaluation data, after training",
            f"- `eval_forward_kl`: {metrics['eval_forward_kl']:.4g}, KL(teacher || student), ",
            f"- trl_promptkd: {trl_promptkd.__version__}\n",
            f"- Transformers: {transformers.__version__}\n",
            f"- Pytorch: {torch.__version__}\n",
            f"- PEFT: {peft.__version__}\n",
            'from_pretrained("me/student")',
        ):
            assert part in card.text, part
        assert "eval_runtime" not in card.text
        assert "licence" not in card.data.to_dict()

    @pytest.mark.parametrize("peft_prompt", [False, True])
    def test_names_no_folder_of_this_machine(self, hub, promptkd, tmp_path, peft_prompt):
        folders = {"model": str(tmp_path / "some" / "start"), "teacher_model": str(tmp_path / "some" / "mentor")}
        for folder in folders.values():
            tiny_model().save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "suppose you are"}
        text |= {"num_virtual_tokens": 3, "tokenizer_name_or_path": folders["teacher_model"]}
        parts = {**folders, "peft_config": lora()}
        if peft_prompt:
            parts["prompt_encoder_config"] = PromptTuningConfig(task_type="CAUSAL_LM", **text)
        trainer = promptkd(**parts, hub_strategy="checkpoint", **PUSHES, **SAVES)
        trainer.train()
        shutil.rmtree(folders["model"])  # TRL takes what is no folder for a name on the Hub
        trainer.push_to_hub(dataset_name=str(tmp_path / "rows.jsonl"))
        for place in ("", "last-checkpoint/"):
            card = card_of(hub, place)
            assert str(tmp_path) not in card
            assert "base_model:" not in card.split("---")[1]
            assert "adapter of `start`" in card
            assert "distilled from `mentor`" in card
            assert "None" not in card
            assert 'from_pretrained("path/to/mentor")' in card
            assert "Replace `path/to/...`" in card

    def test_keeps_the_links_to_trackers(self, promptkd, tmp_path, monkeypatch):
        monkeypatch.setattr(base_trainer, "get_comet_experiment_url", lambda: "https://comet.example/run")
        promptkd().create_model_card("x")
        assert "](https://comet.example/run)\n" in (tmp_path / "run" / "README.md").read_text()

    def test_without_a_repository_says_so(self, hub, promptkd, tmp_path):
        promptkd().create_model_card("x")
        card = (tmp_path / "run" / "README.md").read_text()
        assert 'from_pretrained("path/to/run")' in card
        assert 'from_pretrained("path/to/the-teacher")' in card
        assert "`a model without a name`" in card
        assert "## Evaluation" not in card

    def test_metrics_are_those_of_the_weights_that_are_pushed(self, hub, promptkd):
        """With `load_best_model_at_end`, the best checkpoint's."""
        settings = {**BEST, "max_steps": 3, "metric_for_best_model": "rank", "greater_is_better": True}
        trainer = promptkd(eval_dataset=answered_dataset(2), hub_model_id="me/student", **settings)
        ranks, original = iter([1.0, 3.0, 2.0]), trainer.evaluation_loop

        def ranked(*args, **kwargs):
            output = original(*args, **kwargs)
            output.metrics["eval_rank"] = next(ranks)
            return output

        trainer.evaluation_loop = ranked
        trainer.train()
        trainer.push_to_hub()
        assert "after step 2" in card_of(hub)
        assert "- `eval_rank`: 3\n" in card_of(hub)

    def test_self_distillation_loads_the_start(self, hub, names, promptkd):
        trainer = promptkd("me/start", None, peft_config=lora(), hub_model_id="me/student")
        trainer.push_to_hub()
        assert "the student's own starting weights" in card_of(hub)
        wanted = trainer.prompted_teacher_logits(IDS, torch.ones_like(IDS))
        prompted = logits(run_code_of(card_of(hub))["prompted_teacher"])
        same(prompted[:, -IDS.size(1) :], wanted, atol=1e-4, rtol=1e-4)


def test_the_pages_code_runs(hub, tmp_path, monkeypatch):
    """Every block of docs/hub.md in its order, with tiny models under the names that it uses."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for name, seed in (("Qwen/Qwen2.5-0.5B-Instruct", 1), ("Qwen/Qwen2.5-7B-Instruct", 2)):
        tiny_model(seed=seed).push_to_hub(name)
        tiny_tokenizer(TEXT).push_to_hub(name)
    get_peft_model(tiny_model(seed=1), lora()).push_to_hub("you/student-adapter")
    prompt_dataset().push_to_hub("trl-lib/ultrafeedback-prompt")
    build_teacher_cache(
        tiny_model(seed=2),
        answered_dataset(),
        "gsm8k-cache",
        processing_class=tiny_tokenizer(TEXT),
        priming="ground_truth",
    )
    short = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    short |= {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2}
    for _, config in METHODS.values():
        monkeypatch.setattr(config, "__init__", partialmethod(_with, config.__init__, short))
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
