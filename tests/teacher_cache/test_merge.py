"""A cache that several hosts build in parts, and that is merged."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from paths import SCRIPTS
from tiny import answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from trainers import PRIMING

from trl_promptkd import PrimingTemplate, TeacherCache, build_teacher_cache, merge_teacher_caches
from trl_promptkd.generation import store
from trl_promptkd.teacher_cache import merge, sources, writer


PARTS = ["1/3", "2/3", "3/3"]


def build_in(root, part=None, folder=None, **settings):
    """Builds in a folder of its own, named after the part. Rows run one by one, so that equal ones are equal to the
    bit."""
    if part is not None and part[0] != "1" and settings.get("preset") != "tiny":
        settings = {"basis": str(root / "part1" / "basis.safetensors"), **settings}
    settings = {"dataset": answered_dataset(14), "preset": "exact", "priming": PRIMING, **settings}
    settings = {"teacher": tiny_model(seed=2), "processing_class": tiny_tokenizer(), **settings}
    folder = str(root / (folder or (f"part{part[0]}" if part else "whole")))
    return build_teacher_cache(output_dir=folder, part=part, batch_size=1, **settings)


@pytest.fixture
def build(tmp_path):
    return partial(build_in, tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BYTES_A_PART", 0)  # a shard for each row
        for part in PARTS:
            build_in(root, part)
    return root


@pytest.fixture
def parts(built, tmp_path):
    """The folders of the three parts."""
    return [str(shutil.copytree(built / f"part{part[0]}", tmp_path / f"part{part[0]}")) for part in PARTS]


def by_key(cache):
    return {row["key"]: row for row in cache.rows}


class TestParts:
    @pytest.mark.parametrize("preset", ["tiny", "standard", "exact"])
    def test_merged_they_are_one_build_row_for_row(self, build, tmp_path, preset):
        parts = [build(part, preset=preset) for part in PARTS]
        assert [part.manifest.part for part in parts] == PARTS
        assert all(0 < len(part) < 14 for part in parts)
        merged = merge_teacher_caches([part.path for part in parts[::-1]], str(tmp_path / "merged"))
        whole = build(preset=preset)
        assert by_key(merged) == by_key(whole)
        ours, theirs = merged.manifest, whole.manifest
        assert ours.settings() == theirs.settings()
        assert (ours.part, ours.data, ours.files) == (None, theirs.data, theirs.files)
        assert ours.receipt["tokens"] == sum(part.manifest.receipt["tokens"] for part in parts)
        if preset != "tiny":
            tokens = [part.manifest.receipt["kl_tokens"] for part in parts]
            means = [part.manifest.receipt["kl_mean"] for part in parts]
            expected = sum(map(float.__mul__, map(float, tokens), means)) / sum(tokens)
            assert ours.receipt["kl_mean"] == pytest.approx(expected)
        TeacherCache(merged.path)  # with its checksums

    def test_a_merged_cache_grows_as_any_other(self, build, parts, tmp_path, monkeypatch):
        merged = merge_teacher_caches(parts, str(tmp_path / "merged"))
        counts, original = [], sources.completion_states
        monkeypatch.setattr(
            sources,
            "completion_states",
            lambda model, ids, *a, **k: (counts.append(len(ids)), original(model, ids, *a, **k))[1],
        )
        assert len(build(folder="merged")) == len(merged)
        assert sum(counts) == 0
        assert len(build(folder="merged", dataset=answered_dataset(16))) == 16
        assert sum(counts) == 2

    def test_answers_of_the_teacher_are_shared_out_too(self, build, tmp_path):
        settings = {"dataset": prompt_dataset(12), "response_source": "teacher", "max_new_tokens": 4}
        settings["generation_kwargs"] = {"do_sample": False}
        parts = [build(part, **settings) for part in PARTS]
        merged = merge_teacher_caches([part.path for part in parts], str(tmp_path / "merged"))
        whole = build(**settings)
        assert sum(map(len, parts)) == len(merged) == 12
        assert sorted(merged.rows["key"]) == sorted(whole.rows["key"])

    def test_the_file_of_part_1_may_be_in_the_folder_already(self, build, parts, tmp_path):
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        shutil.copy(os.path.join(parts[0], "basis.safetensors"), folder)
        assert by_key(build("2/3", folder="elsewhere", basis=None)) == by_key(TeacherCache(parts[1]))

    def test_training_on_a_part_is_refused(self, primed, parts):
        with pytest.raises(ValueError, match=r"is part 2/3 of one .* Merge its parts: `trl-promptkd cache merge OUT"):
            primed(teacher_model=None, train_dataset=answered_dataset(4), teacher_cache=parts[1])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"part": "0/3"}, "`part` is '0/3'; it must be a number and how many there are, such as '2/3'"),
            ({"part": "4/3"}, "`part` is '4/3'"),
            ({"part": "two"}, "`part` is 'two'"),
            ({"part": "2/3", "basis": None}, r"`part` is '2/3', but `basis` is missing.*Start that one first"),
            ({"part": "1/2", "basis": "x", "preset": "tiny"}, "`basis` is 'x', but the preset 'tiny' keeps draws"),
            ({"part": "1/500"}, "`part` is '1/500', which has none of the 14 rows in `dataset`. Build fewer parts"),
        ],
    )
    def test_what_cannot_work_is_refused(self, build, settings, message):
        with pytest.raises(ValueError, match=message):
            build(**settings)

    def test_a_folder_goes_on_as_the_part_that_it_is(self, build, parts):
        for part in (None, "2/3", "1/2"):
            with pytest.raises(ValueError, match=f"`part` is '1/3' there and {part!r} here"):
                build(part, folder="part1")

    def test_coordinates_of_another_teacher_or_cache_are_refused(self, build, parts, tmp_path):
        other = build(folder="other", teacher=tiny_model(seed=3))
        basis = os.path.join(other.path, "basis.safetensors")
        with pytest.raises(ValueError, match="were made with another output head than that of this teacher"):
            build("2/3", folder="new", basis=basis)
        with pytest.raises(ValueError, match="has other coordinates than"):
            build("2/3", basis=basis)

    def test_fewer_coordinates_than_the_preset_keeps_are_refused(self, build, monkeypatch):
        """Rows of `exact` in the coordinates of a coarser preset would be wrong without a word."""
        monkeypatch.setitem(writer.PRESETS, "standard", replace(writer.PRESETS["standard"], rank=8))
        monkeypatch.setattr(writer, "_CALIBRATION_TOKENS", 10**6)
        settings = {"dataset": answered_dataset(24), "teacher": tiny_model(seed=2, hidden_size=16)}
        coarse = build(folder="coarse", preset="standard", **settings)
        basis = os.path.join(coarse.path, "basis.safetensors")
        assert TeacherCache(coarse.path).basis.analysis.shape[1] == 8
        with pytest.raises(ValueError, match=r"are 8 of hidden states of \d+ numbers, but the preset 'exact' needs"):
            build(folder="fine", preset="exact", basis=basis, **settings)

    def test_coordinates_of_another_width_are_refused(self, build, tmp_path):
        wider = build(folder="wider", teacher=tiny_model(seed=2, hidden_size=64))
        with pytest.raises(ValueError, match="of hidden states of 64 numbers, but the preset 'exact' needs"):
            build("2/3", folder="new", basis=os.path.join(wider.path, "basis.safetensors"))

    def test_damaged_coordinates_of_a_part_are_not_fitted_anew(self, build, parts):
        path = Path(parts[1], "basis.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(ValueError, match=r"was damaged\. Pass the file of part 1 as `basis`"):
            build("2/3", basis=None)
        assert len(build("2/3")) == len(TeacherCache(parts[1]))


class TestMerge:
    @pytest.mark.parametrize("copies", [False, True])
    def test_killed_after_each_file_in_turn_it_resumes(self, parts, tmp_path, monkeypatch, copies):
        """Killed while a file is being written, and before the manifest."""
        target, original = tmp_path / "merged", merge._link
        if copies:

            def no_link(*args):
                raise OSError(18, "Invalid cross-device link")

            monkeypatch.setattr(os, "link", no_link)
        left = []

        def die_at_the_second(path, temporary):
            left.append(path)
            if len(left) < 2:
                original(path, temporary)
                return
            Path(temporary).write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(merge, "_link", die_at_the_second)
        files = 1 + sum(len(TeacherCache(part).manifest.shards) for part in parts)
        for number in range(1, files):
            left.clear()
            with pytest.raises(KeyboardInterrupt):
                merge_teacher_caches(parts, str(target))
            assert len(left) == 2
            assert len([path for path in target.iterdir() if path.suffix != ".incomplete"]) == number
            assert not (target / "manifest.json").exists()
        left.clear()
        assert len(merge_teacher_caches(parts, str(target))) == 14
        assert len(left) == 1  # the last file; nothing is placed twice
        assert len(TeacherCache(str(target))) == 14
        one = next(target.glob("shard-*"))
        assert (one.stat().st_nlink == 1) == copies

    def test_a_damaged_file_that_is_there_is_put_there_again(self, parts, tmp_path):
        target = tmp_path / "merged"
        merge_teacher_caches(parts, str(target))
        shard = next(target.glob("shard-*"))
        shard.unlink()
        shard.write_bytes(b"PAR1")
        merge_teacher_caches(parts, str(target))
        assert len(TeacherCache(str(target))) == 14

    def refused(self, parts, folder, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            merge_teacher_caches(parts, str(folder))
        assert not (folder / "manifest.json").exists()

    def test_parts_that_are_missing_or_there_twice_are_named(self, parts, tmp_path):
        target = tmp_path / "merged"
        self.refused(parts[1:2], target, r"2 of 3 parts are missing \(1/3, 3/3\)")
        self.refused([], target, "There are no parts")
        shutil.copytree(parts[1], tmp_path / "copy")
        self.refused([*parts, str(tmp_path / "copy")], target, r"part2 and .*copy are both part 2/3")
        self.refused(["nowhere", *parts], target, "'nowhere' is neither a folder")
        assert not target.exists()

    def test_parts_of_other_caches_are_named_with_what_differs(self, build, parts, tmp_path):
        target, basis = tmp_path / "merged", os.path.join(parts[0], "basis.safetensors")
        tokenizer, renamed = tiny_tokenizer(), tiny_model(seed=2)
        tokenizer.chat_template += " "
        renamed.config._name_or_path = "another"
        for name, settings in {
            "priming": {"priming": PrimingTemplate("green ")},
            "chat_template": {"processing_class": tokenizer},
            "preset": {"preset": "standard", "basis": basis},
            "teacher": {"teacher": renamed},
            "max_length": {"max_length": 50},
        }.items():
            other = build(**{"part": "3/3", "folder": f"other-{name}", "basis": basis, **settings}).path
            self.refused([*parts[:2], other], target, f"part1 .there. and .*other-{name} .here. .*: `{name}` is ")
        other = build("2/2", folder="half").path
        self.refused([parts[0], other], target, "there are 3 parts there and 2 here")
        self.refused([parts[0], build().path], target, "whole is a whole cache, not a part of one")

    def test_other_coordinates_and_other_data_are_refused(self, build, parts, tmp_path):
        data = answered_dataset(15).select(range(1, 15))
        one = build("1/3", folder="one", dataset=data).path
        two = build("2/3", folder="two", dataset=data, basis=os.path.join(one, "basis.safetensors")).path
        self.refused([parts[0], two], tmp_path / "merged", r"part1 and .*two have different coordinates.*`basis` set")
        # A row that another part has: shards that were copied from one folder into the other
        shutil.copytree(parts[0], tmp_path / "doubled")
        manifest = tmp_path / "doubled" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"1/3"', '"2/3"'))
        self.refused(
            [parts[0], str(tmp_path / "doubled")], tmp_path / "merged", r"The row \w+ is in .*part1 and in .*do"
        )

    def test_a_damaged_part_is_named(self, parts, tmp_path):
        path = next(Path(parts[2]).glob("shard-*"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        self.refused(parts, tmp_path / "merged", f"{path.name} is damaged")

    def test_a_folder_that_holds_something_else_is_refused(self, build, parts, tmp_path):
        other = build(folder="other", dataset=answered_dataset(3)).path
        with pytest.raises(ValueError, match=r"other holds other rows than these parts"):
            merge_teacher_caches(parts, other)
        assert len(TeacherCache(other)) == 3
        another = build(folder="another", preset="tiny").path
        with pytest.raises(ValueError, match="another holds another cache than these parts: `preset` is 'tiny' there"):
            merge_teacher_caches(parts, another)
        with pytest.raises(ValueError, match="is both a part and `output_dir`"):
            merge_teacher_caches(parts, parts[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_a_merge_that_is_killed_at_random_moments_ends_as_an_undisturbed_one(parts, tmp_path):
    whole = merge_teacher_caches(parts, str(tmp_path / "whole"))
    settings = json.dumps({"parts": parts, "output_dir": str(tmp_path / "merged"), "seed": 0})
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / "merge_kills.py"), settings], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    print(report)
    assert report["status"] == 0, result.stderr[-3000:]
    assert report["kills"] >= 4
    assert report["half_written"] >= 2
    files = [sorted(os.listdir(tmp_path / name)) for name in ("whole", "merged")]
    assert files[0] == files[1]
    assert by_key(TeacherCache(str(tmp_path / "merged"))) == by_key(whole)
