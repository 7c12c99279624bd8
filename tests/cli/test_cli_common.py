import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_rows, tiny_model, tiny_tokenizer

from trl_promptkd.cli import common


class TestShortNames:
    def test_last_parts_or_whole_paths_if_two_are_the_same(self, tmp_path):
        files = [str(tmp_path / name) for name in ("dev.json", "rows.jsonl", "rows.csv")]
        for file in files:
            open(file, "w").close()
        assert list(common.short_names(files[:2], "`--x`").values()) == ["dev", "rows"]
        assert list(common.short_names(files, "`--x`").values()) == files
        assert common.short_names(["run/checkpoint-1.5", "run/checkpoint-1.6"], "`--x`") == {
            "run/checkpoint-1.5": "checkpoint-1.5",
            "run/checkpoint-1.6": "checkpoint-1.6",
        }
        assert common.short_names(["x", "y/x"], "`--x`") == {"x": "x", "y/x": "y/x"}

    def test_one_path_twice_is_refused(self):
        with pytest.raises(ValueError, match=r"'a/b' is given twice in `--x`. Give each once"):
            common.short_names(["a/b", "c", "a//b/"], "`--x`")


def test_json_has_null_for_what_is_not_finite_at_any_depth():
    values = {"a": [{"b": (float("nan"), 1.0)}, float("inf")], "c": "nan"}
    assert json.loads(common.json_text(values)) == {"a": [{"b": [None, 1.0]}, None], "c": "nan"}


class TestLoadModel:
    @pytest.mark.parametrize("mark", ["hf_device_map", "quantization_method", None])
    def test_what_is_placed_already_stays(self, monkeypatch, mark):
        moved = []
        model = SimpleNamespace(
            to=lambda device: moved.append(device) or model,
            eval=lambda: model,
            **({mark: {"": "cpu"}} if mark else {}),
        )
        monkeypatch.setattr(common, "load_teacher", lambda *args: model)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert common.load_model("a", {}, False) is model
        assert moved == ([] if mark else ["cuda"])


class TestLoadRows:
    def test_files_folders_and_parts(self, tmp_path):
        for name in ("train", "test"):
            save_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(3)])
        datasets.load_dataset("json", data_files=str(tmp_path / "train.jsonl"), split="train").to_parquet(
            tmp_path / "rows.parquet"
        )

        def prompts(name, split):
            return common.load_rows(str(tmp_path / name), None, split)["prompt"][:]

        assert prompts("train.jsonl", None) == ["train 0", "train 1", "train 2"]
        assert prompts("train.jsonl", "test[:2]") == ["train 0", "train 1"]
        assert prompts("rows.parquet", "train[2:]") == ["train 2"]
        assert len(prompts("*.jsonl", None)) == 6
        assert prompts("", "test[:1]") == ["test 0"]

    def test_what_save_to_disk_wrote_is_refused_with_a_remedy(self, tmp_path):
        datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match=r"`--dataset` is .*saved', which cannot be read: .*dataset.to_parquet"):
            common.load_rows(str(tmp_path / "saved"), None, "train")


class TestTokenizer:
    def test_of_an_adapter_it_is_the_models_below_it(self, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path / "model")
        model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
        model.save_pretrained(tmp_path / "adapter")
        found = common.needed_tokenizer("--model", str(tmp_path / "adapter"), {}, False)
        assert found.get_vocab() == tokenizer.get_vocab()
        assert found.pad_token == "<eos>"

    def test_without_one_the_flag_is_named(self, tmp_path):
        assert common.load_tokenizer(str(tmp_path), {}, False) is None
        with pytest.raises(ValueError, match=r"`--teacher` is .*, beside which there is no tokenizer. Save one there"):
            common.needed_tokenizer("--teacher", str(tmp_path), {}, False)
