"""Whatever comes from elsewhere is refused with a ValueError or is right: nothing else happens, and soon."""

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
from fuzzing import SECONDS, fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import answered_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import PrimingTemplate, PromptEncoderConfig, SoftPrompt, TeacherCache, build_teacher_cache
from trl_promptkd.files import sha256_of
from trl_promptkd.generation.teacher_answers import _read_answers
from trl_promptkd.teacher_cache.manifest import Manifest, row_key
from trl_promptkd.trainer.prompt_optimizer import PromptOptimizer


# ------------------------------------------------------------------------------------------------ priming texts


class Clock:
    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *args):
        assert time.perf_counter() - self.start < SECONDS


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.just("\udfff" * 9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=5,
)


class TestTemplates:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{{ tags | map('upper') | join(', ') }}", "A, B"),
            ("{% for t in tags %}{{ loop.index }}/{{ loop.length }}: {{ t }}{% if not loop.last %}; {% endif %}{% endfor %}", "1/2: a; 2/2: b"),
            ("{{ hint | default('none') }} {{ name.strip().title() }} {{ name | trim | upper }}", "h Ann Lee ANN LEE"),
            ("{{ tags | length }}{{ tags | first }}{{ tags | last }}{{ tags[1:] | list }}", "2ab['b']"),
            ("{{ score | round(1) }} {{ '7' | int + 1 }} {{ score * 2 }} {{ 7 // 2 }} {{ -n % 2 }}", "0.2 8 0.5 3 1"),
            ("{{ turns | tojson }}", '[{"role": "user", "content": "<ü>"}]'),
            ("{% for m in turns if m.role == 'user' %}{{ m['role'] ~ ': ' ~ m.content }}{% endfor %}", "user: <ü>"),
            ("{% set ns = namespace(found=false) %}{% for t in tags %}{% if t == 'b' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}", "True"),
            ("{% for k, v in meta.items() %}{{ k }}={{ v }}{% endfor %}{{ meta.get('z', '?') }}", "a=1?"),
            ("{{ turns | selectattr('role', 'equalto', 'user') | map(attribute='content') | join }}", "<ü>"),
            ("{{ name | replace(' ', '') if 'Lee' in name and tags is not none else '' }} {{ (name ~ '!')[2:] }}", "annLee nn Lee !"),
            ("{% with x = n + 1 %}{{ x }}{% endwith %}{{ name.split()[0] }}{{ name.split() | reverse | join('-') }}", "4annLee-ann"),
            ("{{ ', '.join(tags) }}{{ name.strip().replace(' ', '-').removeprefix('ann') }}{{ name.count('e') }}{{ name.find('L') }}", "a, b-Lee25"),
            ("{{ tags | sort(reverse=true) | join }}{{ [3, 1] | max }}{{ tags | unique | list | length }}", "ba32"),
        ],
    )  # fmt: skip
    def test_ordinary_templates_work(self, text, expected):
        row = {
            "prompt": "q",
            "tags": ["a", "b"],
            "hint": "h",
            "name": " ann Lee ",
            "score": 0.25,
            "n": 3,
            "meta": {"a": 1},
            "turns": [{"role": "user", "content": "<ü>"}],
        }
        assert PrimingTemplate(text).render(row) == expected

    def test_long_plain_texts_and_long_columns_work(self):
        assert len(PrimingTemplate("x" * 1_000_000).render({"prompt": "b"})) == 1_000_000
        assert len(PrimingTemplate("{{ prompt | trim }}").render({"prompt": "b" * 900_000})) == 900_000

    @pytest.mark.parametrize(
        "row",
        [
            {"messages": [None]},
            {"messages": "abc"},
            {"messages": [{"role": "user"}, 3]},
            {"messages": {"a": 1}},
            {"prompt": 3},
            {"prompt": None},
            {"prompt": [{"content": "x"}]},
            {"prompt": [{"role": "user", "content": 3}]},
            {"prompt": [{"role": "user", "content": None}]},
            {"prompt": [{"role": "user", "content": [3]}]},
            {"prompt": "a", "completion": 3},
            {"prompt": "a", "completion": [[]]},
        ],
    )
    def test_malformed_rows_are_refused(self, row):
        for template in (PrimingTemplate("a"), PrimingTemplate("{{ reference_answer }}")):
            with pytest.raises(ValueError, match=r"message|a text|prompt|answer"):
                template.prime(row)

    @fuzz(200)
    @given(VALUES)
    def test_any_row(self, value):
        template = PrimingTemplate(
            "{{ x }}{% for y in x %}{{ y | string | upper }}{{ loop.index }}{% endfor %}{{ x.a }}"
        )
        before = repr(value)
        with Clock():
            try:
                template.render({"prompt": "b", "x": value})
            except ValueError as error:
                assert "x" in str(error)  # noqa: PT017
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


@pytest.fixture(scope="module")
def opened(caches):
    """Opens a copy of a cache that was tampered with, by somebody who writes the checksums too."""
    copied = caches.parent / "changed"

    def opened(preset, change, sign=True):
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(caches / preset, copied)
        shard = next(copied.glob("shard-*.parquet"))
        path = copied / "manifest.json"
        manifest = json.loads(path.read_text())
        change(SimpleNamespace(folder=copied, shard=shard, basis=copied / "basis.safetensors", manifest=manifest))
        if sign:
            for entry in manifest["shards"]:
                entry["sha256"] = sha256_of(str(shard))
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

    def apply(cache):
        table = pyarrow.parquet.read_table(cache.shard)
        pyarrow.parquet.write_table(change(table), cache.shard)

    return apply


def column(name, values, kind=None):
    def change(table):
        made = [values(value) for value in table[name].to_pylist()]
        array = pyarrow.array(made, type=table.schema.field(name).type if kind is None else kind)
        return table.set_column(table.schema.names.index(name), name, array)

    return table_change(change)


def with_key(name, values):
    """Ids that are changed together with their hash."""

    def change(table):
        rows = table.to_pylist()
        for row in rows:
            row[name] = values(row[name])
            row["key"] = row_key(row["teacher_prompt_ids"], row["completion_ids"])
        return pyarrow.Table.from_pylist(rows, schema=table.schema)

    return table_change(change)


int32s = pyarrow.list_(pyarrow.int32())
SHARDS = {
    "not parquet": lambda cache: cache.shard.write_bytes(b"PAR1" * 9),
    "empty": lambda cache: cache.shard.write_bytes(b""),
    "a folder": lambda cache: (cache.shard.unlink(), cache.shard.mkdir()),
    "a column less": table_change(lambda table: table.drop_columns(["coefficients_3"])),
    "no key": table_change(lambda table: table.drop_columns(["key"])),
    "a column more": table_change(lambda table: table.append_column("x", table["key"])),
    "a column twice": table_change(lambda table: table.append_column("key", table["key"])),
    "ids as texts": column("completion_ids", lambda ids: list(map(str, ids)), pyarrow.list_(pyarrow.string())),
    "wide ids": column("completion_ids", lambda ids: ids, pyarrow.list_(pyarrow.int64())),
    "lists of lists": column("completion_ids", lambda ids: [ids], pyarrow.list_(int32s)),
    "negative ids": with_key("completion_ids", lambda ids: [-1 for _ in ids]),
    "ids beyond the vocabulary": with_key("teacher_prompt_ids", lambda ids: [2**31 - 1 for _ in ids]),
    "missing ids": column("completion_ids", lambda ids: [None for _ in ids]),
    "missing rows": column("completion_ids", lambda ids: None),
    "missing keys": column("key", lambda key: None),
    "missing payload": column("coefficients_high", lambda value: None),
    "payload as text": column("coefficients_high", lambda value: "x", pyarrow.string()),
    "payload cut": column("coefficients_high", lambda value: value[:-1]),
    "payload of another length": column("coefficients_high", lambda value: value * 2),
    "another key": column("key", lambda key: key[::-1]),
    "a key that is none": column("key", lambda key: "\0"),
    "another answer": column("completion_ids", lambda ids: [*ids[::-1], 5]),
    "a longer answer": with_key("completion_ids", lambda ids: ids * 2),
    "no answer": with_key("completion_ids", lambda ids: []),
}  # fmt: skip
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
        if change is SHARDS["a folder"]:
            with pytest.raises(FileNotFoundError, match="is missing"):
                opened("exact", change, sign=False)
            return
        with (
            Clock(),
            pytest.raises(ValueError, match=r"shard-\w+\.parquet is damaged|Row 0 of the teacher cache"),
        ):
            opened("exact", change)

    @pytest.mark.parametrize("change", DRAWS.values(), ids=DRAWS)
    def test_draws_that_are_none_are_refused_and_named(self, opened, change):
        with Clock(), pytest.raises(ValueError, match=r"Row 0 of the teacher cache .* is damaged: "):
            opened("tiny", change)

    @pytest.mark.parametrize("name", ["counts", "values", "tail", "gaps_0", "gaps_1", "gaps_2"])
    @pytest.mark.parametrize("value", [0, 255])
    def test_likeliest_tokens_are_right_or_refused(self, opened, name, value):
        try:
            opened("standard", column(name, lambda old: bytes([value]) * len(old)))
        except ValueError as error:
            assert "Row 0 of the teacher cache" in str(error)  # noqa: PT017

    def test_no_rows_are_no_error(self, opened):
        assert len(opened("exact", table_change(lambda table: table.slice(0, 0)))) == 0

    def test_columns_in_another_order_are_the_same_cache(self, opened):
        assert len(opened("exact", table_change(lambda table: table.select(table.column_names[::-1])))) == 4

    def test_a_damaged_shard_is_made_anew_and_never_read(self, caches, tmp_path):
        folder = tmp_path / "cache"
        shutil.copytree(caches / "exact", folder)
        shard = next(folder.glob("shard-*.parquet"))
        SHARDS["negative ids"](SimpleNamespace(shard=shard))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][0]["sha256"] = sha256_of(str(shard))
        (folder / "manifest.json").write_text(json.dumps(manifest))
        args = (tiny_model(seed=2), answered_dataset(4), str(folder), tiny_tokenizer(), "teacher", "exact")
        assert min(map(min, build_teacher_cache(*args).rows["completion_ids"])) >= 0

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

            with Clock():
                try:
                    opened(preset, change)
                except ValueError as error:
                    assert "shard-" in str(error) or "Row " in str(error) or "basis" in str(error)  # noqa: PT017

        flip()

    @pytest.mark.parametrize("preset", ["tiny", "standard", "exact"])
    def test_any_payload(self, opened, caches, preset):
        names = TeacherCache(str(caches / preset))._payload

        @fuzz(30)
        @given(st.sampled_from(names), st.binary(max_size=300), st.booleans())
        def replace(name, data, same_length):
            def values(old):
                return (data * len(old))[: len(old)] if same_length and data else data

            with Clock():
                try:
                    opened(preset, column(name, values))
                except ValueError as error:
                    assert "Row 0 of the teacher cache" in str(error)  # noqa: PT017

        replace()


def basis_change(**changes):
    def apply(cache):
        tensors = load_file(cache.basis)
        for name, change in changes.items():
            tensors[name] = change(tensors.get(name))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, cache.basis)

    return apply


def with_entry(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[3] = value
    return tensor


BASES = {
    "a tensor less": basis_change(mean=lambda x: None),
    "a tensor more": basis_change(other=lambda x: torch.ones(1)),
    "half precision": basis_change(offset=lambda x: x.half()),
    "double precision": basis_change(analysis=lambda x: x.double()),
    "integers": basis_change(head=lambda x: x.int()),
    "a flat matrix": basis_change(analysis=lambda x: x.flatten()),
    "turned": basis_change(head=lambda x: x.T),
    "another rank": basis_change(scale=lambda x: x[:-1]),
    "no rank": basis_change(scale=lambda x: x[:0], head=lambda x: x[:0], analysis=lambda x: x[:, :0]),
    "another vocabulary": basis_change(offset=lambda x: x[:-1], head=lambda x: x[:, :-1]),
    "no vocabulary": basis_change(offset=lambda x: x[:0], head=lambda x: x[:, :0]),
    "NaN": basis_change(mean=lambda x: with_entry(x, math.nan)),
    "infinite": basis_change(offset=lambda x: with_entry(x, math.inf)),
    "infinite head": basis_change(head=lambda x: with_entry(x, math.inf)),
    "too large": basis_change(scale=lambda x: with_entry(x, 3e38)),
    "a head above 1": basis_change(head=lambda x: with_entry(x, 2.0)),
    "two softcaps": basis_change(softcap=lambda x: torch.ones(2)),
    "a negative softcap": basis_change(softcap=lambda x: torch.tensor(-1.0)),
    "a NaN softcap": basis_change(softcap=lambda x: torch.tensor(math.nan)),
    "truncated": lambda cache: cache.basis.write_bytes(cache.basis.read_bytes()[:-9]),
    "empty": lambda cache: cache.basis.write_bytes(b""),
    "a huge header": lambda cache: cache.basis.write_bytes(b"\xff" * 100),
}


class TestBases:
    @pytest.mark.parametrize("change", BASES.values(), ids=BASES)
    def test_coordinates_that_do_not_fit_are_refused_and_named(self, opened, change):
        with Clock(), pytest.raises(ValueError, match=r"basis\.safetensors"):
            opened("exact", change)

    @pytest.mark.parametrize("preset", ["tiny", "exact"])
    def test_a_basis_without_a_checksum_is_refused(self, opened, preset):
        def change(cache):
            cache.manifest["files"] = {} if preset == "exact" else {"basis.safetensors": "0" * 64}
            cache.basis.touch()

        with pytest.raises(ValueError, match=r"has checksums of .*, but the preset .* Build the cache again"):
            opened(preset, change)


class TestPaths:
    @pytest.mark.parametrize(
        "name",
        [
            "../x",
            "/etc/passwd",
            "a/b",
            "",
            ".",
            "..",
            "a\0b",
            "a\\b",
            "C:x",
            "*",
            "x" * 300,
            "\n",
            "~",
            " a",
            "\ud800",
        ],
    )
    @pytest.mark.parametrize("where", ["shards", "files"])
    def test_only_plain_names_are_opened(self, opened, where, name):
        def change(cache):
            if where == "files":
                cache.manifest["files"][name] = "0" * 64
            else:
                cache.manifest["shards"][0]["file"] = name
            (cache.folder / "manifest.json").write_text(json.dumps(cache.manifest))

        with pytest.raises(ValueError, match=r"manifest\.json (?s:.*)(names a file outside its folder|is not JSON)"):
            opened("exact", change, sign=False)

    def test_a_file_may_not_be_named_twice(self, opened):
        with pytest.raises(ValueError, match="or one twice"):
            opened("exact", lambda cache: cache.manifest["shards"].append(cache.manifest["shards"][0].copy()))

    def test_links_into_the_hubs_blobs_work(self, opened, tmp_path):
        """As `snapshot_download` lays them out."""

        def change(cache):
            for index, path in enumerate([cache.shard, cache.basis]):
                blob = tmp_path / f"blob{index}"
                shutil.move(path, blob)
                os.symlink(blob, path)

        assert len(opened("exact", change)) == 4


class TestManifests:
    json_values = st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(10**12), 10**12),
            st.just(10**400),
            st.floats(),
            st.text(max_size=5),
            st.sampled_from(["exact", "dataset", "0" * 32, "0" * 64, "\ud800"]),
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
        max_leaves=5,
    )

    def check(self, path):
        try:
            with Clock():
                manifest = Manifest.load(str(path))
        except ValueError as error:
            assert "manifest.json" in str(error) or "codec version" in str(error)  # noqa: PT017
            return None
        assert type(manifest.vocab_size) is type(manifest.real_vocab_size) is int
        assert 1 <= manifest.vocab_size <= 2**22
        assert math.isfinite(manifest.temperature)
        assert all(set(shard) == {"file", "rows", "tokens", "bytes", "sha256"} for shard in manifest.shards)
        assert all(isinstance(text, str) for text in (manifest.tokenizer, manifest.preset, manifest.data))
        assert all(math.isfinite(value) for value in manifest.receipt.values())
        json.dumps(manifest.settings(), ensure_ascii=False).encode()
        return manifest

    def test_any_bytes(self, tmp_path):
        path = tmp_path / "manifest.json"

        @fuzz(150)
        @given(st.one_of(st.binary(), self.json_values.map(lambda value: json.dumps(value).encode())))
        def check(data):
            path.write_bytes(data)
            self.check(path)

        check()
        for data in (b"[" * 100_000, b"1" * 5000, b'{"a":' * 5000):
            path.write_bytes(data)
            self.check(path)

    def test_there_is_none(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Manifest.load(str(tmp_path / "manifest.json"))

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
                place[name] = data.draw(self.json_values)
            elif what == "remove":
                del place[name]
            elif isinstance(place, dict):
                place[data.draw(st.text(max_size=5))] = data.draw(self.json_values)
            path.write_text(json.dumps(changed))
            self.check(path)

        check()
        path.write_text(json.dumps(valid))
        assert self.check(path) is not None

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("shards", 3, "'shards' expected a list"),
            ("shards", [{}], "`shards` has the entry {}; it must be of {'file': "),
            ("vocab_size", "x", "'vocab_size' expected int, got str (value: 'x')"),
            ("vocab_size", 10**12, "`vocab_size` is 1000000000000; it must be from 1 to 4194304"),
            ("vocab_size", True, "'vocab_size' expected int, got bool"),
            ("real_vocab_size", -1, "`real_vocab_size` is -1; it must be from 1 to 4194304"),
            ("priming", [], "'priming' with value [] doesn't match any type"),
            ("files", {"basis.safetensors": 3}, "Invalid key or value in dict 'files'"),
            ("temperature", math.nan, "`temperature` is nan"),
            ("tokenizer", 3, "'tokenizer' expected str, got int (value: 3)"),
            ("teacher", {"name": "x"}, "`teacher` or `priming` has ['name']; it must have ['dtype', "),
            ("sampling", 3, "'sampling' with value 3 doesn't match any type"),
            ("max_length", 0.5, "'max_length' with value 0.5 doesn't match any type"),
            ("response_source", ["dataset"], "'response_source' expected str, got list"),
            ("preset", "best", "`preset` is 'best'"),
            ("receipt", {"kl_mean": "x"}, "Invalid key or value in dict 'receipt'"),
            ("data", None, "'data' expected str, got NoneType"),
            ("codec_version", 2, "'codec_version' expected one of (1,), got 2"),
        ],
    )
    def test_a_wrong_field_is_named_with_what_it_must_be(self, opened, field, value, message):
        def change(cache):
            cache.manifest[field] = value
            (cache.folder / "manifest.json").write_text(json.dumps(cache.manifest))

        with Clock(), pytest.raises(ValueError, match=rf"manifest\.json is not (?s:.*){re.escape(message)}"):
            opened("exact", change, sign=False)

    @pytest.mark.parametrize("value", ["best", "tiny", "standard"])
    def test_another_preset_is_refused(self, opened, value):
        with pytest.raises(ValueError, match=r"preset|shard"):
            opened("exact", lambda cache: cache.manifest.update(preset=value))


# ------------------------------------------------------------------------------------------------ soft prompts


def tensors_change(**changes):
    def change(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        for name, new in changes.items():
            tensors[name.replace("__", ".")] = new
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata=metadata)

    return change


FILES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"\x80\x04." * 50),
    "a tensor more": tensors_change(other=torch.ones(1)),
}
PROMPTS = {
    **FILES,
    "a tensor less": tensors_change(initial=None),
    "another shape": tensors_change(initial=torch.ones(3, 32)),
    "integers": tensors_change(initial=torch.ones(7, 32, dtype=torch.int32)),
    "half precision": tensors_change(initial=torch.ones(7, 32, dtype=torch.float16)),
    "double precision": tensors_change(encoder__embedding__weight=torch.ones(7, 32, dtype=torch.float64)),
    "NaN": tensors_change(encoder__embedding__weight=torch.full((7, 32), math.nan)),
    "infinite": tensors_change(initial=torch.full((7, 32), math.inf)),
}


def soft_prompt():
    config = PromptEncoderConfig(prompt_init_text="suppose you are a student .")
    return SoftPrompt(config, tiny_model(seed=3), tiny_tokenizer())


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

    def test_flipped_bytes(self, tmp_path):
        prompt = soft_prompt()
        prompt.save_adapter(str(tmp_path))
        path = tmp_path / "prompt_encoder.safetensors"
        valid = path.read_bytes()

        @fuzz(100)
        @given(st.integers(0, 250), st.integers(1, 255))
        def flip(position, mask):
            data = bytearray(valid)
            data[position] ^= mask
            path.write_bytes(data)
            try:
                prompt.load_parameters(str(tmp_path))
            except ValueError as error:
                assert "prompt_encoder.safetensors" in str(error)  # noqa: PT017
            assert prompt().isfinite().all()

        flip()


def metadata_change(**changes):
    def change(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        metadata = {name: value for name, value in {**metadata, **changes}.items() if value is not None}
        save_file(load_file(path), path, metadata=metadata)

    return change


def schedule_change(**changes):
    def change(path):
        with safe_open(path, framework="pt") as file:
            schedule = json.loads(file.metadata()["scheduler"])
        metadata_change(scheduler=json.dumps({**schedule, **changes}))(path)

    return change


SHAPE = (7, 32)
STATES = {
    **FILES,
    "a tensor less": tensors_change(**{"0__step": None}),
    "of another parameter": tensors_change(**{"1__step": torch.tensor(1.0)}),
    "a name that is none": tensors_change(step=torch.tensor(1.0)),
    "another shape": tensors_change(**{"0__exp_avg": torch.ones(3, 32)}),
    "half precision": tensors_change(**{"0__exp_avg": torch.ones(SHAPE, dtype=torch.float16)}),
    "integers": tensors_change(**{"0__step": torch.tensor(1)}),
    "NaN": tensors_change(**{"0__exp_avg": torch.full(SHAPE, math.nan)}),
    "a negative square": tensors_change(**{"0__exp_avg_sq": -torch.ones(SHAPE)}),
    "a negative step": tensors_change(**{"0__step": torch.tensor(-1.0)}),
    "no metadata": lambda path: save_file(load_file(path), path),
    "no scale": metadata_change(loss_scale=None),
    "a scale that is no JSON": metadata_change(loss_scale="x"),
    "a scale that is a list": metadata_change(loss_scale="[1.0]"),
    "a scale of 0": metadata_change(loss_scale="0"),
    "a scale of NaN": metadata_change(loss_scale="NaN"),
    "an infinite scale": metadata_change(loss_scale="1" + "0" * 400),
    "a schedule that is no JSON": metadata_change(scheduler="{"),
    "a schedule that is nested": metadata_change(scheduler="[" * 100_000),
    "a schedule that is a number": metadata_change(scheduler="3"),
    "a schedule with more": schedule_change(step=3),
    "a schedule of another kind": schedule_change(last_epoch="x"),
    "a schedule before its start": schedule_change(last_epoch=-3),
    "rates of another number": schedule_change(base_lrs=[1.0, 1.0]),
    "rates of NaN": schedule_change(_last_lr=[math.nan]),
}


class TestPromptOptimizers:
    @pytest.fixture
    def optimizer(self, make_args):
        optimizer = PromptOptimizer(soft_prompt(), PromptEncoderConfig(), make_args(), 4, Accelerator(cpu=True))
        for parameter in optimizer.soft_prompt.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer

    @pytest.mark.parametrize("change", STATES.values(), ids=STATES)
    def test_what_is_no_state_is_refused_and_named(self, optimizer, tmp_path, change):
        optimizer.save(str(tmp_path))
        before = optimizer.optimizer.state_dict()["state"][0]["exp_avg"].clone()
        change(tmp_path / "prompt_training_state.safetensors")
        with pytest.raises(ValueError, match=r"prompt_training_state\.safetensors.*(?s:.*)Resume"):
            optimizer.load(str(tmp_path))
        assert torch.equal(optimizer.optimizer.state_dict()["state"][0]["exp_avg"], before)

    def test_what_was_saved_is_loaded(self, optimizer, make_args, tmp_path):
        optimizer.save(str(tmp_path))
        other = PromptOptimizer(soft_prompt(), PromptEncoderConfig(), make_args(), 4, Accelerator(cpu=True))
        other.load(str(tmp_path))
        assert other.learning_rate == optimizer.learning_rate
        assert other.optimizer.state_dict()["state"][0]["step"] == 1


# ------------------------------------------------------------------------------------------------ teacher answers

PARTS = {
    "not parquet": None,
    "a column less": {"key": ["a"]},
    "keys as numbers": {"key": [1], "completion_ids": [[1]]},
    "ids as texts": {"key": ["a"], "completion_ids": [["1"]]},
    "ids without a list": {"key": ["a"], "completion_ids": [1]},
    "lists of lists": {"key": ["a"], "completion_ids": [[[1]]]},
    "negative ids": {"key": ["a"], "completion_ids": [[1, -1]]},
    "ids beyond the vocabulary": {"key": ["a"], "completion_ids": [[40]]},
    "missing ids": {"key": ["a"], "completion_ids": [[1, None]]},
    "missing answers": {"key": ["a", "b"], "completion_ids": [[1], None]},
    "missing keys": {"key": ["a", None], "completion_ids": [[1], [1]]},
}


def with_texts(part):
    texts = [""] * len(part["key"])
    return pyarrow.table({**part, "prompt": texts, "completion": texts})


class TestTeacherAnswers:
    @pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
    def test_what_is_no_answer_is_refused_and_named(self, tmp_path, part):
        path = tmp_path / "answers-x.parquet"
        path.write_bytes(b"PAR1")
        if part is not None:
            pyarrow.parquet.write_table(with_texts(part), path)
        with pytest.raises(ValueError, match=r"answers-x\.parquet is damaged(?s:.*)Delete it"):
            _read_answers(str(tmp_path), {"a": 1}, 40)

    def test_answers_are_read(self, tmp_path):
        pyarrow.parquet.write_table(
            with_texts({"key": ["a", "b"], "completion_ids": [[1, 39], []]}), tmp_path / "answers-x.parquet"
        )
        assert _read_answers(str(tmp_path), {"a": 1, "b": 1}, 40) == {"a": [1, 39], "b": []}
