"""A cache as a data set on the Hub: its card, and a single commit for all files."""

import os

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi

from .card import PLACES, fenced, name_in_cache, settings_table
from .manifest import MANIFEST_FILE, Manifest


__all__ = ["push_cache"]


def push_cache(path: str, manifest: Manifest, repo_id: str, private: bool | None, token: str | None) -> None:
    """Upload the cache in `path` in one commit.

    `upload_folder` makes several commits for some hundred files. A reader in between would find a manifest without its
    shards, and `load_dataset` only some of the rows.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    names = {MANIFEST_FILE, *manifest.files, *(shard["file"] for shard in manifest.shards)}
    there = api.list_repo_files(repo_id, repo_type="dataset")
    stale = [name for name in there if name.endswith((".parquet", ".safetensors")) and name not in names]
    card = _card(manifest, repo_id)
    api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, os.path.join(path, name)) for name in sorted(names)),
            CommitOperationAdd("README.md", str(card).encode()),
        ],
        commit_message="Upload teacher cache",
        repo_type="dataset",
    )


def _card(manifest: Manifest, repo_id: str) -> DatasetCard:
    """What the cache holds and how to use it. Its metadata let `load_dataset` find the shards and notice lost ones."""
    receipt, size = manifest.receipt, sum(shard["bytes"] for shard in manifest.shards)
    rows = {"name": "train", "num_bytes": size, "num_examples": sum(shard["rows"] for shard in manifest.shards)}
    data = DatasetCardData(
        tags=["trl", "teacher-cache", "knowledge-distillation"],
        task_categories=["text-generation"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "shard-*.parquet"}]}],
        dataset_info={"splits": [rows], "download_size": size, "dataset_size": size},
    )
    settings = {
        "teacher's dtype": manifest.teacher["dtype"],
        "teacher's quantization": manifest.teacher["quantization"],
        "teacher's revision": manifest.teacher["revision"],
        "preset": manifest.preset,
        "temperature": manifest.temperature,
        "answers from": manifest.response_source,
        "vocabulary": manifest.real_vocab_size,
        **{name.replace("_", " "): f"{value:.6g}" for name, value in receipt.items()},
    }
    if manifest.priming is None:
        seen = "It saw the prompts as they are (no priming)."
    else:
        place = PLACES[manifest.priming["placement"]]
        seen = f"It saw this text {place} (a Jinja template), which the student is not to see:\n\n"
        seen += fenced(manifest.priming["text"])
    use = f"""```python
from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, TeacherCache

cache = TeacherCache("{repo_id}")
trainer = PrimedDistillTrainer(
    model="<the student>",
    args=PrimedDistillConfig(output_dir="student", kd_temperature={manifest.temperature}, kd_beta=0.0),
    train_dataset=cache.dataset(),
    priming=...,  # what the cache was built with, see above
    teacher_cache=cache,
)
```"""
    if manifest.part is not None:
        use = f"""This is part {manifest.part} of a cache. Join all parts before you train:

```bash
trl-promptkd cache merge cache {repo_id} <the other parts>
```"""
    text = f"""
# A teacher's distributions

What {name_in_cache(manifest.teacher)} said at each token of {rows["num_examples"]} answers, kept to distil a student
from without the teacher. {seen}

{settings_table(settings)}

{use}

`datasets.load_dataset("{repo_id}")` opens the rows: the token ids of both prompts and of the answer, and the
distributions in a compressed form, which `TeacherCache` decodes. Made with
[TRL](https://github.com/huggingface/trl) and trl_promptkd.
"""
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}")
