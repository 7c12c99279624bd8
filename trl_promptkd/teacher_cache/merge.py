"""Joins the parts of a cache that several hosts built."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..files import remove_incomplete, sha256_of, whole_file
from ..generation.store import part_paths
from .manifest import MANIFEST_FILE, Manifest, differing, part_numbers
from .reader import BASIS_FILE, TeacherCache
from .receipt import finish_cache


__all__ = ["merge_teacher_caches"]


def merge_teacher_caches(parts: Sequence[str], output_dir: str) -> TeacherCache:
    """Join the parts of a cache, which `build_teacher_cache(part="1/3")` and so on built.

    Nothing is computed again. Files are linked if `output_dir` is on the same disk as the part, and copied otherwise.
    The manifest is written last. The folder of a killed merge cannot be opened as a cache, and the same call resumes
    it.

    Args:
        parts (`list[str]`): Folders, or ids of data sets on the Hub, in any order.
        output_dir (`str`): The whole cache's folder. It is created if it does not exist.

    Returns:
        [`TeacherCache`].

    Raises:
        FileNotFoundError: if a part, or one of its files, does not exist.
        ValueError: if a part is unfinished, damaged, missing or given twice. If parts have different settings or
            coordinates, or share a row. If the folder holds something else.
    """
    if not parts:
        raise ValueError("There are no parts to merge. Name their folders.")
    numbers: dict[str, str] = {}  # "2/3" -> the part's name
    rows: dict[str, str] = {}  # a row's key -> the part's name
    files: dict[str, str] = {}  # a file's path -> its checksum
    first: Manifest | None = None
    for name in parts:
        part = TeacherCache(name)
        manifest = part.manifest
        if manifest.part is None:
            raise ValueError(f"{name} is a whole cache, not a part of one. Build parts with `part='1/2'` and so on.")
        if os.path.realpath(part.path) == os.path.realpath(output_dir):
            raise ValueError(f"{name} is both a part and `output_dir`. Choose another folder for the whole cache.")
        if manifest.part in numbers:
            raise ValueError(f"{numbers[manifest.part]} and {name} are both part {manifest.part}. Omit one of them.")
        numbers[manifest.part] = name
        first = first or manifest
        _check_same(first, parts[0], manifest, name)
        for key in part.rows["key"]:
            if rows.setdefault(key, name) != name:
                raise ValueError(
                    f"The row {key} is in {rows[key]} and in {name}, so that these parts were built from different "
                    "data. Build all of them from one data set."
                )
        checksums = {shard["file"]: shard["sha256"] for shard in manifest.shards} | manifest.files
        files |= {os.path.join(part.path, file): checksum for file, checksum in checksums.items()}
    assert first is not None
    count = part_numbers(str(first.part))[1]
    missing = [f"{number}/{count}" for number in range(1, count + 1) if f"{number}/{count}" not in numbers]
    if missing:
        raise ValueError(f"{len(missing)} of {count} parts are missing ({', '.join(missing)}). Name all of them.")
    whole = replace(first, part=None, shards=[], files={}, receipt={})
    _place(files, output_dir, whole)
    finish_cache(output_dir, whole)
    return TeacherCache(output_dir, verify_checksums=False)


def _of_one_cache(manifest: Manifest) -> dict[str, Any]:
    """The settings that the parts of one cache have in common."""
    limits = {"max_length": manifest.max_length, "teacher_max_length": manifest.teacher_max_length}
    return manifest.settings() | limits


def _check_same(first: Manifest, first_name: str, other: Manifest, name: str) -> None:
    """Reject a part whose rows do not belong in one cache with those of the first."""
    counts = [part_numbers(str(manifest.part))[1] for manifest in (first, other)]
    differs = differing(_of_one_cache(first), _of_one_cache(other))
    if differs is None and counts[0] != counts[1]:
        differs = f"there are {counts[0]} parts there and {counts[1]} here"
    if differs is not None:
        raise ValueError(f"{first_name} (there) and {name} (here) are not parts of one cache: {differs}.")
    if first.files != other.files:
        raise ValueError(
            f"{first_name} and {name} have different coordinates, so that their rows do not go together. Build the "
            f"second one again in an empty folder, with `basis` set to {os.path.join(first_name, BASIS_FILE)}."
        )


def _place(sources: dict[str, str], folder: str, manifest: Manifest) -> None:
    """Put all files into `folder`, each whole and checked. Intact files are kept."""
    os.makedirs(folder, exist_ok=True)
    remove_incomplete(folder)
    wanted = {os.path.basename(path) for path in sources}
    path = os.path.join(folder, MANIFEST_FILE)
    there = Manifest.load(path) if os.path.isfile(path) else manifest
    differs = differing(there.settings() | {"part": there.part}, manifest.settings() | {"part": None})
    if differs is not None:
        raise ValueError(f"{folder} holds another cache than these parts: {differs}. Choose another folder.")
    strange = [path for path in part_paths(folder, "shard") if os.path.basename(path) not in wanted]
    if strange:
        raise ValueError(f"{folder} holds other rows than these parts ({strange[0]}). Choose another folder.")
    for path, checksum in sources.items():
        target = os.path.join(folder, os.path.basename(path))
        if os.path.isfile(target) and sha256_of(target) == checksum:
            continue
        with whole_file(target) as temporary:
            _link(path, temporary)
        if sha256_of(target) != checksum:
            os.remove(target)
            raise OSError(f"{path} changed while it was copied to {folder}, or the disk is damaged. Start again.")


def _link(path: str, target: str) -> None:
    """One more name for a file, or a copy of it if that is not possible."""
    path = os.path.realpath(path)  # the Hub's cache holds links
    with suppress(OSError):  # another disk, or a file system without links
        os.link(path, target)
        return
    shutil.copyfile(path, target)
