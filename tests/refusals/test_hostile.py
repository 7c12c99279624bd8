"""Whatever comes from elsewhere is refused with a ValueError or is right: nothing else happens, and soon."""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import time
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from case import soft_prompt
from fuzzing import SECONDS, fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import answered_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import PrimingTemplate, PromptEncoderConfig, TeacherCache, build_teacher_cache
from trl_promptkd.files import sha256_of
from trl_promptkd.generation.teacher_answers import _read_answers
from trl_promptkd.teacher_cache.manifest import Manifest, row_key
from trl_promptkd.trainer.prompt_optimizer import PromptOptimizer


@contextlib.contextmanager
def right_or_refused(names):
    """Whatever is within ends soon, and, if in an error, in a ValueError that names the culprit."""
    start = time.perf_counter()
    try:
        yield
    except ValueError as error:
        if not re.search(names, str(error)):
            raise
    assert time.perf_counter() - start < SECONDS


def updated(old, changes):
    """`old` with other values, functions of old values, or, for `None`, without them."""
    made = dict(old)
    for name, change in changes.items():
        made[name] = change(old.get(name)) if callable(change) else change
    return {name: value for name, value in made.items() if value is not None}


def edited(metadata=(), **tensors):
    """A change of a safetensors file."""

    def change(path):
        with safe_open(path, framework="pt") as file:
            old = file.metadata() or {}
        tensors_there = updated(load_file(path), {name.replace("__", "."): x for name, x in tensors.items()})
        save_file(tensors_there, path, metadata=updated(old, dict(metadata)))

    return change


def full(value, *shape, dtype=torch.float32):
    return torch.full(shape or (7, 32), value, dtype=dtype)


FILES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "a huge header": lambda path: path.write_bytes(b"\xff" * 100),
    "a tensor more": edited(other=torch.ones(1)),
}

# ------------------------------------------------------------------------------------------------ priming texts

ANY_JSON = st.recursive(
    st.sampled_from([None, True, 10**400, "exact", "dataset", "0" * 32, "0" * 64, "\ud800"])
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


class TestTemplates:
    @fuzz(200)
    @given(ANY_JSON)
    def test_any_row(self, value):
        template = PrimingTemplate("{{ x }}{% for y in x %}{{ y | string | upper }}{% endfor %}{{ x.a }}")
        before = repr(value)
        with right_or_refused("x"):
            template.render({"prompt": "b", "x": value})
        assert repr(value) == before


# ------------------------------------------------------------------------------------------------ caches


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A folder of each kind of cache."""
    folder = tmp_path_factory.mktemp("caches")
    for preset in ("tiny", "standard", "exact"):
        build_teacher_cache(
            tiny_model(seed=2), answered_dataset(4), str(folder / preset), tiny_tokenizer(), "teacher", preset
        )
    return folder


@pytest.fixture
def opened(caches, tmp_path):
    """Opens a copy of a cache that was tampered with, by somebody who writes the checksums too."""

    def opened(preset, change, sign=True):
        copied = tmp_path / "changed"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(caches / preset, copied)
        (shard,) = copied.glob("shard-*.parquet")
        path = copied / "manifest.json"
        manifest = json.loads(path.read_text())
        change(SimpleNamespace(shard=shard, basis=copied / "basis.safetensors", manifest=manifest))
        if sign:
            manifest["shards"][0]["sha256"] = sha256_of(str(shard))
            manifest["files"] = {name: sha256_of(str(copied / name)) for name in manifest["files"]}
        path.write_text(json.dumps(manifest))
        cache = TeacherCache(str(copied))
        log_probs = cache.log_probs(range(len(cache)))
        assert log_probs.shape == (sum(map(len, cache.rows["completion_ids"])), cache.manifest.vocab_size)
        assert log_probs.isfinite().all()
        entropies = cache.answers(range(len(cache))).entropies()
        assert entropies is None or entropies.isfinite().all()
        return cache

    return opened


def table_change(change):
    """A change of a shard's table."""
    return lambda path: pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(path)), path)


def column(name, values, kind=None):
    def change(table):
        array = pyarrow.array(map(values, table[name].to_pylist()), type=kind or table.schema.field(name).type)
        return table.set_column(table.schema.names.index(name), name, array)

    return table_change(change)


def with_key(name, values):
    """Ids that are changed together with their hash."""

    def change(table):
        rows = [{**row, name: values(row[name])} for row in table.to_pylist()]
        for row in rows:
            row["key"] = row_key(row["teacher_prompt_ids"], row["completion_ids"])
        return pyarrow.Table.from_pylist(rows, schema=table.schema)

    return table_change(change)


SHARDS = {
    "not parquet": lambda path: path.write_bytes(b"PAR1" * 9),
    "a column less": table_change(lambda table: table.drop_columns(["coefficients_3"])),
    "a column twice": table_change(lambda table: table.append_column("key", table["key"])),
    "ids as texts": column("completion_ids", lambda ids: list(map(str, ids)), pyarrow.list_(pyarrow.string())),
    "payload as text": column("coefficients_high", lambda value: "x", pyarrow.string()),
    "negative ids": with_key("completion_ids", lambda ids: [-1 for _ in ids]),
    "ids beyond the vocabulary": with_key("teacher_prompt_ids", lambda ids: [2**31 - 1 for _ in ids]),
    "missing ids": column("completion_ids", lambda ids: [None for _ in ids]),
    "missing payload": column("coefficients_high", lambda value: None),
    "payload cut": column("coefficients_high", lambda value: value[:-1]),
    "payload of another length": column("coefficients_high", lambda value: value * 2),
    "another key": column("key", lambda key: key[::-1]),
    "another answer": column("completion_ids", lambda ids: [*ids[::-1], 5]),
    "a longer answer": with_key("completion_ids", lambda ids: ids * 2),
}
DRAWS = {
    "counts of 0": column("counts", lambda value: bytes(len(value))),
    "counts that claim too much": column("counts", lambda value: b"\xff" * len(value)),
    "more counts": column("counts", lambda value: value * 1000),
    "drawn 0 times": column("values", lambda value: bytes(len(value))),
    "ids twice": column("gaps_0", lambda value: bytes(len(value))),
    "ids too large": column("gaps_2", lambda value: b"\xff" * len(value)),
    "entropies that are NaN": column("entropy", lambda value: b"\xff" * len(value)),
    "entropies cut": column("entropy", lambda value: value[:-1]),
}


class TestShards:
    @pytest.mark.parametrize("change", SHARDS.values(), ids=SHARDS)
    def test_what_a_build_does_not_write_is_refused_and_named(self, opened, change):
        with pytest.raises(ValueError, match=r"shard-\w+\.parquet is damaged|Row 0 of the teacher cache"):
            opened("exact", lambda cache: change(cache.shard))

    @pytest.mark.parametrize("change", DRAWS.values(), ids=DRAWS)
    def test_draws_that_are_none_are_refused_and_named(self, opened, change):
        with pytest.raises(ValueError, match=r"Row 0 of the teacher cache .* is damaged: "):
            opened("tiny", lambda cache: change(cache.shard))

    @pytest.mark.parametrize(
        ("change", "rows"),
        [(lambda table: table.slice(0, 0), 0), (lambda table: table.select(table.column_names[::-1]), 4)],
        ids=["no rows", "another order of columns"],
    )
    def test_what_is_no_error(self, opened, change, rows):
        assert len(opened("exact", lambda cache: table_change(change)(cache.shard))) == rows

    @pytest.mark.parametrize("preset", ["tiny", "standard", "exact"])
    def test_flipped_bytes(self, opened, preset):
        @fuzz(30)
        @given(st.integers(0, 10**6), st.integers(1, 255), st.booleans(), st.integers(0, 3))
        def flip(position, mask, cut, where):
            def change(cache):
                path = cache.basis if where == 0 and cache.basis.exists() else cache.shard
                data = bytearray(path.read_bytes())
                data[position % len(data)] ^= mask
                path.write_bytes(data[: position % len(data)] if cut else data)

            with right_or_refused("shard-|Row |basis"):
                opened(preset, change)

        flip()

    @pytest.mark.parametrize("preset", ["tiny", "standard", "exact"])
    def test_any_payload(self, opened, caches, preset):
        names = TeacherCache(str(caches / preset))._payload

        @fuzz(30)
        @given(st.sampled_from(names), st.sampled_from([b"\0", b"\xff"]) | st.binary(max_size=300), st.booleans())
        def replace(name, data, same_length):
            def values(old):
                return (data * len(old))[: len(old)] if same_length and data else data

            with right_or_refused(r"Row \d of the teacher cache"):
                opened(preset, lambda cache: column(name, values)(cache.shard))

        replace()


def with_entry(value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


BASES = {
    **FILES,
    "a tensor less": edited(mean=None),
    "half precision": edited(offset=lambda x: x.half()),
    "a flat matrix": edited(analysis=lambda x: x.flatten()),
    "no rank": edited(scale=lambda x: x[:0], head=lambda x: x[:0], analysis=lambda x: x[:, :0]),
    "another vocabulary": edited(offset=lambda x: x[:-1], head=lambda x: x[:, :-1].contiguous()),
    "NaN": edited(mean=with_entry(math.nan)),
    "infinite head": edited(head=with_entry(math.inf)),
    "too large": edited(scale=with_entry(3e38)),
    "a head above 1": edited(head=with_entry(2.0)),
    "two softcaps": edited(softcap=torch.ones(2)),
    "a negative softcap": edited(softcap=torch.tensor(-1.0)),
}


class TestBases:
    @pytest.mark.parametrize("change", BASES.values(), ids=BASES)
    def test_coordinates_that_do_not_fit_are_refused_and_named(self, opened, change):
        with pytest.raises(ValueError, match=r"basis\.safetensors"):
            opened("exact", lambda cache: change(cache.basis))


class TestPaths:
    @pytest.mark.parametrize(
        "name", ["../x", "/etc/passwd", "a/b", "", "..", "a\0b", "a\\b", "C:x", "*", "x" * 300, "\n", "~", "\ud800"]
    )
    @pytest.mark.parametrize("where", ["shards", "files"])
    def test_only_plain_names_are_opened(self, opened, where, name):
        def change(cache):
            if where == "files":
                cache.manifest["files"][name] = "0" * 64
            else:
                cache.manifest["shards"][0]["file"] = name

        with pytest.raises(ValueError, match=r"manifest\.json (?s:.*)(names a file outside its folder|is not JSON)"):
            opened("exact", change, sign=False)

    def test_links_into_the_hubs_blobs_work(self, opened, tmp_path):
        """As `snapshot_download` lays them out."""

        def change(cache):
            for path in (cache.shard, cache.basis):
                os.symlink(shutil.move(path, tmp_path / f"blob-{path.name}"), path)

        assert len(opened("exact", change)) == 4


def check_manifest(path):
    """It has the right types, or an error says that it has not."""
    with right_or_refused(r"manifest\.json|codec version"):
        manifest = Manifest.load(str(path))
        assert type(manifest.vocab_size) is type(manifest.real_vocab_size) is int
        assert 1 <= manifest.vocab_size <= 2**22
        assert math.isfinite(manifest.temperature)
        assert all(set(shard) == {"file", "rows", "tokens", "bytes", "sha256"} for shard in manifest.shards)
        assert all(isinstance(text, str) for text in (manifest.tokenizer, manifest.preset, manifest.data))
        assert all(math.isfinite(value) for value in manifest.receipt.values())
        json.dumps(manifest.settings(), ensure_ascii=False).encode()


class TestManifests:
    def test_any_bytes(self, tmp_path):
        path = tmp_path / "manifest.json"

        @fuzz(150)
        @given(st.one_of(st.binary(), ANY_JSON.map(lambda value: json.dumps(value).encode())))
        def check(data):
            path.write_bytes(data)
            check_manifest(path)

        check()
        for data in (b"[" * 100_000, b"1" * 5000, b'{"a":' * 5000):
            path.write_bytes(data)
            check_manifest(path)

    def test_any_change_of_a_field(self, caches, tmp_path):
        valid = json.loads((caches / "standard" / "manifest.json").read_text())
        path = tmp_path / "manifest.json"

        @fuzz(400)
        @given(st.data())
        def check(data):
            changed = copy.deepcopy(valid)
            place = changed
            name = data.draw(st.sampled_from(sorted(place)))
            while isinstance(place[name], dict | list) and place[name] and data.draw(st.booleans()):
                place = place[name]
                name = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else [0]))
            what = data.draw(st.sampled_from(["replace", "remove", "add"]))
            if what == "replace":
                place[name] = data.draw(ANY_JSON)
            elif what == "remove":
                del place[name]
            elif isinstance(place, dict):
                place[data.draw(st.text(max_size=5))] = data.draw(ANY_JSON)
            path.write_text(json.dumps(changed))
            check_manifest(path)

        check()

    @pytest.mark.parametrize(
        ("preset", "field", "value", "message"),
        [
            ("exact", "shards", [{}], "`shards` has the entry {}; it must be of"),
            ("exact", "vocab_size", 10**12, "`vocab_size` is 1000000000000; it must be from 1 to 4194304"),
            ("exact", "files", {"basis.safetensors": 3}, "Invalid key or value in dict 'files'"),
            ("exact", "temperature", math.nan, "`temperature` is nan"),
            ("exact", "tokenizer", 3, "'tokenizer' expected str, got int"),
            ("exact", "teacher", {"name": "x"}, r"`teacher` or `priming` has \['name'\]; it must have"),
            ("exact", "response_source", ["dataset"], "'response_source' expected str, got list"),
            ("exact", "preset", "best", "`preset` is 'best'"),
            ("exact", "preset", "standard", "shard"),
            ("exact", "files", {}, "has checksums of .*, but the preset .* Build the cache again"),
            ("tiny", "files", {"basis.safetensors": "0" * 64}, "has checksums of .*, but the preset"),
        ],
    )
    def test_a_wrong_field_is_named_with_what_it_must_be(self, opened, preset, field, value, message):
        with pytest.raises(ValueError, match=message):
            opened(preset, lambda cache: cache.manifest.update({field: value}), sign=False)

    def test_a_file_may_not_be_named_twice(self, opened):
        with pytest.raises(ValueError, match="or one twice"):
            opened("exact", lambda cache: cache.manifest["shards"].append(cache.manifest["shards"][0].copy()))


# ------------------------------------------------------------------------------------------------ checkpoints

PROMPTS = {
    **FILES,
    "a tensor less": edited(initial=None),
    "another shape": edited(initial=full(1.0, 3, 32)),
    "half precision": edited(initial=full(1.0, dtype=torch.float16)),
    "NaN": edited(encoder__embedding__weight=full(math.nan)),
}


class TestSoftPrompts:
    @pytest.mark.parametrize("change", PROMPTS.values(), ids=PROMPTS)
    def test_what_is_no_prompt_is_refused_and_named(self, tmp_path, change):
        prompt = soft_prompt()
        prompt.save_adapter(str(tmp_path))
        change(tmp_path / "prompt_encoder.safetensors")
        before = prompt().detach().clone()
        with pytest.raises(ValueError, match=r"prompt_encoder\.safetensors .*Resume"):
            prompt.load_parameters(str(tmp_path))
        assert torch.equal(prompt(), before)


STATES = {
    **FILES,
    "a tensor less": edited(**{"0__step": None}),
    "another shape": edited(**{"0__exp_avg": full(1.0, 3, 32)}),
    "another schedule": edited({"scheduler": lambda old: json.dumps({**json.loads(old), "step": 3})}),
}


class TestPromptOptimizers:
    @pytest.fixture
    def make_optimizer(self, make_args):
        return lambda: PromptOptimizer(soft_prompt(), PromptEncoderConfig(), make_args(), 4, Accelerator(cpu=True))

    @pytest.fixture
    def optimizer(self, make_optimizer, tmp_path):
        """After a step that was saved."""
        optimizer = make_optimizer()
        for parameter in optimizer.soft_prompt.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.save(str(tmp_path))
        return optimizer

    @pytest.mark.parametrize("change", STATES.values(), ids=STATES)
    def test_what_is_no_state_is_refused_and_named(self, optimizer, tmp_path, change):
        before = optimizer.optimizer.state_dict()["state"][0]["exp_avg"].clone()
        change(tmp_path / "prompt_training_state.safetensors")
        with pytest.raises(ValueError, match=r"prompt_training_state\.safetensors.*(?s:.*)Resume"):
            optimizer.load(str(tmp_path))
        assert torch.equal(optimizer.optimizer.state_dict()["state"][0]["exp_avg"], before)

    def test_what_was_saved_is_loaded(self, optimizer, make_optimizer, tmp_path):
        other = make_optimizer()
        other.load(str(tmp_path))
        assert other.learning_rate == optimizer.learning_rate
        assert other.optimizer.state_dict()["state"][0]["step"] == 1


# ------------------------------------------------------------------------------------------------ teacher answers

PARTS = {
    "a column less": {"key": ["a"]},
    "keys as numbers": {"key": [1], "completion_ids": [[1]]},
    "negative ids": {"key": ["a"], "completion_ids": [[1, -1]]},
    "ids beyond the vocabulary": {"key": ["a"], "completion_ids": [[40]]},
    "missing ids": {"key": ["a"], "completion_ids": [[1, None]]},
    "missing answers": {"key": ["a", "b"], "completion_ids": [[1], None]},
}


def with_texts(part):
    texts = [""] * len(part["key"])
    return pyarrow.table({**part, "prompt": texts, "completion": texts})


class TestTeacherAnswers:
    @pytest.mark.parametrize("part", [None, *PARTS.values()], ids=["not parquet", *PARTS])
    def test_what_is_no_answer_is_refused_and_named(self, tmp_path, part):
        path = tmp_path / "answers-x.parquet"
        path.write_bytes(b"PAR1")
        if part is not None:
            pyarrow.parquet.write_table(with_texts(part), path)
        with pytest.raises(ValueError, match=r"answers-x\.parquet is damaged(?s:.*)Delete it"):
            _read_answers(str(tmp_path), {"a": 1}, 40)
