import json
import os
import pickle

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets, load_dataset
from reference import kl, log_probs
from tiny import WORDS, answered_dataset, chat_dataset, prompt_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import PrimedDistillTrainer, PrimingTemplate, TeacherCache, build_teacher_cache, verify_teacher_cache
from trl_promptkd.generation import store
from trl_promptkd.teacher_cache import sources, writer
from trl_promptkd.teacher_cache.codec import PRESETS, Basis, Preset, decode, encode, entropies
from trl_promptkd.teacher_cache.manifest import row_key


PRIMING = PrimingTemplate("red blue ")
DENSE = ["standard", "faithful", "exact"]


@pytest.fixture
def build(tmp_path):
    def build(dataset=None, teacher=None, preset="exact", folder="cache", priming=PRIMING, **kwargs):
        return build_teacher_cache(
            tiny_model(seed=2) if teacher is None else teacher,
            answered_dataset(12) if dataset is None else dataset,
            str(tmp_path / folder),
            processing_class=kwargs.pop("processing_class", tiny_tokenizer()),
            priming=priming,
            preset=preset,
            batch_size=2,
            **kwargs,
        )

    return build


@pytest.fixture
def passes(monkeypatch):
    """How many rows were put through the teacher."""
    counts, original = [], sources.completion_states

    def states(model, ids, *args, **kwargs):
        counts.append(len(ids))
        return original(model, ids, *args, **kwargs)

    monkeypatch.setattr(sources, "completion_states", states)
    return counts


def assert_equal(one, other):
    """Both hold the same rows, and say the same of them."""
    assert sorted(one.rows["key"]) == sorted(other.rows["key"])
    for row in one.rows:
        pair = [c.log_probs([c.find(row["teacher_prompt_ids"], row["completion_ids"])]) for c in (one, other)]
        assert (pair[0] - pair[1]).abs().max() < 1e-3


class TestCodec:
    """On states with a few large directions, as real ones have."""

    @pytest.fixture
    def head(self):
        torch.manual_seed(0)
        scales = torch.logspace(0.5, -1.5, 32)
        return torch.randn(2000, 32) @ torch.diag(scales), torch.randn(500, 32)

    def roundtrip(self, head, preset, softcap=0.0, bias=None):
        hidden, weight = head
        basis = Basis.fit(hidden, weight, bias=bias, softcap=softcap, rank=preset.rank)
        logits = hidden[:300] @ weight.T + (0 if bias is None else bias)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        columns = encode(hidden[:300], logits, basis, preset)
        return logits.log_softmax(-1), decode(columns, basis, preset, 500), columns

    @pytest.mark.parametrize("softcap", [0.0, 3.0])
    @pytest.mark.parametrize("preset", DENSE)
    def test_what_comes_back_is_normalized_and_close(self, head, preset, softcap):
        expected, got, _ = self.roundtrip(head, PRESETS[preset], softcap, bias=torch.randn(500))
        assert (got.exp().sum(-1) - 1).abs().max() < 1e-3
        limit = {"standard": 0.1, "faithful": 0.1, "exact": 1e-3}[preset]
        assert kl(expected, got) / len(got) < limit

    def test_the_error_grows_with_the_square_of_the_step(self, head):
        errors = [float(kl(*self.roundtrip(head, Preset(step=step))[:2])) for step in (0.02, 0.04)]
        assert errors[1] / errors[0] == pytest.approx(4, rel=0.15)

    def test_coordinates_beat_plain_rounding_of_the_state(self, head):
        """The point of the metric: the same number of levels spent on the state itself costs more."""
        hidden, weight = head
        expected, _, columns = self.roundtrip(head, Preset(step=0.05))
        step = float((hidden[:300] - hidden.mean(0)).std()) * 0.25
        plain = ((hidden[:300] / step).round() * step) @ weight.T
        size = [len(np.unique(np.frombuffer(value, dtype=np.uint8))) for value in columns.values()]
        assert max(size) < 256
        assert kl(expected, plain.log_softmax(-1)) > 4 * kl(expected, self.roundtrip(head, Preset(step=0.05))[1])

    def test_likeliest_tokens_are_kept_one_by_one(self, head):
        expected, got, columns = self.roundtrip(head, Preset(step=10.0, top_k=200, nucleus=0.9999))
        assert set(columns["coefficients_high"]) == {0}
        top = expected.argmax(-1, keepdim=True)
        # 63 levels over 20 nats, linear in the root: a step of 0.64 nats at the most for tokens worth anything
        assert (got.gather(-1, top) - expected.gather(-1, top)).abs().max() < 0.1
        assert kl(expected, got) / len(got) < 0.02

    def test_the_tail_keeps_its_mass(self, head):
        expected, got, columns = self.roundtrip(head, Preset(step=10.0, top_k=5))
        counts = np.frombuffer(columns["counts"], dtype=np.uint8)
        for row in range(20):
            ids = expected[row].topk(int(counts[row])).indices
            tail = 1 - expected[row, ids].exp().sum()
            kept = 1 - got[row, ids].exp().sum()
            assert float(kept) == pytest.approx(float(tail), rel=0.07, abs=1e-3)  # 1/8 of log-odds

    def test_draws_are_unbiased_in_the_value_and_the_gradient_of_the_forward_kl(self):
        """A known distribution, drawn from often; the entropy that draws lack is put back."""
        torch.manual_seed(0)
        logits, student = torch.randn(1, 12), torch.randn(1, 12, requires_grad=True)
        p, q = logits.log_softmax(-1), student.log_softmax(-1)
        (expected,) = torch.autograd.grad(kl(p, q), student, retain_graph=True)
        many = 4000
        columns = encode(torch.zeros(many, 1), logits.expand(many, -1), None, PRESETS["tiny"], seed=1)
        drawn = decode(columns, None, PRESETS["tiny"], 12)
        assert (drawn.exp().sum(-1) - 1).abs().max() < 1e-5
        estimate = kl(drawn, q) / many
        (gradient,) = torch.autograd.grad(estimate, student, retain_graph=True)
        assert (gradient - expected).abs().max() < 5e-3
        gap = (entropies(columns) + (drawn.exp() * drawn).sum(-1)).mean()
        assert float(estimate.detach() - gap) == pytest.approx(float(kl(p, q).detach()), rel=0.01)

    @pytest.mark.parametrize("temperature", [0.02, 50.0])
    @pytest.mark.parametrize("preset", DENSE)
    def test_sharp_and_flat_distributions(self, head, preset, temperature):
        hidden, weight = head
        expected, got, _ = self.roundtrip((hidden, weight / temperature), PRESETS[preset])
        assert got.isfinite().all()
        assert kl(expected, got) / len(got) < 0.1

    def test_states_that_are_not_finite_are_refused(self, head):
        hidden, weight = head
        basis = Basis.fit(hidden, weight)
        bad = hidden[:3].clone()
        bad[1, 2] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            encode(bad, bad @ weight.T, basis, PRESETS["exact"])

    def test_damaged_strings_are_refused(self, head):
        hidden, weight = head
        preset = PRESETS["standard"]
        basis = Basis.fit(hidden, weight, rank=preset.rank)
        columns = encode(hidden[:9], hidden[:9] @ weight.T, basis, preset)
        for name in ("coefficients_high", "coefficients_3", "counts", "values", "tail", "gaps_0"):
            with pytest.raises(ValueError, match=r"damaged|reshape"):
                decode({**columns, name: columns[name] + b"\1"}, basis, preset, 500)
        with pytest.raises(ValueError, match="beyond the vocabulary"):
            decode({**columns, "gaps_2": b"\xff" * len(columns["gaps_2"])}, basis, preset, 500)

    def test_a_basis_is_saved_and_checked(self, head, tmp_path):
        basis = Basis.fit(*head, rank=8, softcap=2.0)
        basis.save(str(tmp_path / "b.safetensors"))
        again = Basis.load(str(tmp_path / "b.safetensors"))
        assert torch.equal(again.head, basis.head)
        assert again.softcap == 2.0
        basis.mean = basis.mean[:3]
        basis.save(str(tmp_path / "b.safetensors"))
        with pytest.raises(ValueError, match="do not fit together"):
            Basis.load(str(tmp_path / "b.safetensors"))


class TestBuild:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
    @pytest.mark.parametrize("preset", DENSE)
    def test_rows_are_found_by_their_content_and_close_to_the_teacher(self, build, family, preset):
        teacher = tiny_model(family, seed=2)
        cache = build(chat_dataset(9), teacher, preset)
        vocab = cache.manifest.vocab_size
        for index in (7, 0, 3):
            row = cache.rows[index]
            prompt, completion = row["teacher_prompt_ids"], row["completion_ids"]
            assert prompt[:3] == [2, 23, 24]  # <user> red blue
            number = cache.find(prompt, completion)
            assert number == index
            expected = log_probs(teacher, prompt + completion, len(prompt))[:, :vocab].log_softmax(-1)
            got = cache.log_probs([number])
            assert got.shape == (len(completion), vocab)
            assert kl(expected, got) / len(got) < (1e-3 if preset == "exact" else 0.05)
        assert cache.find([1], [2]) is None
        assert cache.log_probs([]).shape == (0, vocab)
        receipt = cache.manifest.receipt
        assert receipt["rows"] == 9
        assert receipt["tokens"] == sum(map(len, cache.rows["completion_ids"]))
        assert 0 <= receipt["kl_mean"] < 0.05
        assert 0 < receipt["kl_tokens"] < receipt["tokens"]
        assert receipt["bytes_per_token"] > 0
        assert receipt["decode_microseconds_per_token"] > 0

    def test_is_a_data_set_in_which_equal_rows_are_kept_once(self, build, tmp_path):
        build(concatenate_datasets([answered_dataset(12)] * 3))
        data = load_dataset(
            "parquet", data_files=str(tmp_path / "cache" / "*.parquet"), split="train", cache_dir=str(tmp_path / "c")
        )
        assert len(data) == 12
        manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
        assert {**manifest["priming"], "hash": ""} == {"text": "red blue ", "placement": "prefix", "hash": ""}
        assert len(manifest["priming"]["hash"]) == 32
        assert manifest["teacher"]["dtype"] == "float32"

    def test_padding_and_order_change_nothing(self, build):
        assert_equal(build(folder="a"), build(answered_dataset(12).select(range(11, -1, -1)), folder="b"))

    def test_the_teacher_may_write_the_answers(self, build):
        cache = build(prompt_dataset(5), response_source="teacher", max_new_tokens=6)
        assert len(cache.dataset()) == 5
        assert all(cache.rows["completion_ids"])
        assert cache.manifest.sampling["max_new_tokens"] == 6

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"preset": "best"}, "`preset` is 'best'; it must be 'tiny' or 'standard' or 'faithful' or 'exact'"),
            ({"response_source": "student"}, "`response_source` is 'student'"),
            ({"max_new_tokens": 0}, "`max_new_tokens` is 0; it must be above 0"),
            ({"dataset": prompt_dataset(2)}, "holds prompts without answers"),
        ],
    )
    def test_refusals(self, build, change, message):
        with pytest.raises(ValueError, match=message):
            build(**change)

    def test_a_teacher_with_something_after_its_head_is_refused(self, build):
        teacher = tiny_model(seed=2)
        teacher.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * 2)
        original = teacher.forward

        def forward(*args, **kwargs):
            output = original(*args, **kwargs)
            output.logits = output.logits.square()
            return output

        teacher.forward = forward
        with pytest.raises(ValueError, match="not its output head applied to its last hidden state"):
            build(teacher=teacher)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_rank_that_has_run_out_of_rows_runs_a_sharded_teacher_only(build, passes, monkeypatch, sharded):
    original = writer.compute_missing

    def more_batches_elsewhere(lengths, done, compute, *args):
        original(lengths, done, compute, *args)
        assert compute([]) == {}

    monkeypatch.setattr(writer, "compute_missing", more_batches_elsewhere)
    monkeypatch.setattr(sources, "is_sharded", lambda model: sharded)
    build(answered_dataset(4), preset="tiny")
    assert passes == [2, 2] + [1] * sharded


class TestInterruption:
    def test_what_is_there_is_not_computed_again(self, build, passes):
        build(answered_dataset(6))
        before = sum(passes)
        grown = build(answered_dataset(12))
        assert sum(passes) - before == 6
        assert len(grown) == 12
        build(answered_dataset(12))
        assert sum(passes) - before == 6
        assert len(set(grown.rows["key"])) == 12

    def test_killed_after_every_shard_in_turn(self, build, passes, monkeypatch):
        whole = build(folder="whole")
        monkeypatch.setattr(store, "SECONDS_A_PART", 0.0)
        original = writer.write_part

        def die(*args):
            original(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(writer, "write_part", die)
        for _ in range(6):
            with pytest.raises(KeyboardInterrupt):
                build()
        monkeypatch.setattr(writer, "write_part", original)
        passes.clear()
        cache = build()
        assert sum(passes) == 0
        assert cache.manifest.receipt["kl_tokens"] > 0  # kept beside the rows, not in a process that was killed
        assert cache.manifest.data == whole.manifest.data
        assert_equal(whole, cache)

    def test_what_a_killed_build_left_half_written_is_removed_and_never_read(self, build, tmp_path):
        (tmp_path / "cache" / "_teacher_answers").mkdir(parents=True)
        left = [
            tmp_path / "cache" / "shard-abc.parquet.1.incomplete",
            tmp_path / "cache" / "manifest.json.1.incomplete",
            tmp_path / "cache" / "_teacher_answers" / "answers-abc.parquet.1.incomplete",
        ]
        for path in left:
            path.write_bytes(b"PAR1")
        assert len(build(prompt_dataset(5), response_source="teacher", max_new_tokens=4)) == 5
        assert not any(path.exists() for path in left)

    def test_a_full_disk_loses_nothing(self, build, monkeypatch, passes):
        build(answered_dataset(6))
        write = store.pyarrow.parquet.ParquetWriter

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store.pyarrow.parquet, "ParquetWriter", full)
        with pytest.raises(OSError, match=r"could not be written to .*No space left.*make room and start again"):
            build()
        monkeypatch.setattr(store.pyarrow.parquet, "ParquetWriter", write)
        passes.clear()
        assert len(build()) == 12
        assert sum(passes) == 6

    def test_another_cache_in_the_folder_is_refused(self, build):
        build()
        assert build(generation_kwargs={"bad_words_ids": ((1,),)}) is not None
        for change in ({"preset": "standard"}, {"priming": None}, {"teacher": tiny_model(seed=3)}):
            with pytest.raises(
                ValueError, match=r"was made differently: `(preset|priming|teacher)` is .* there and .* here"
            ):
                build(**change)


def test_rows_of_two_builds_at_once_are_refused(build, tmp_path):
    """Each has written shards of its own, with some of the same rows."""
    one = build(folder="one", preset="tiny")
    other = build(answered_dataset(9), folder="other", preset="tiny")
    for file in os.listdir(other.path):
        if file.startswith("shard"):
            os.link(os.path.join(other.path, file), os.path.join(one.path, file))
    with pytest.raises(ValueError, match=r"twice: two builds wrote into it at the same time\. Delete that file"):
        build(folder="one", preset="tiny")


def test_a_padded_vocabulary_is_verified_on_its_real_ids(build):
    teacher = tiny_model(seed=2, vocab_size=48)
    result = verify_teacher_cache(build(teacher=teacher), teacher)
    assert result["same_weights"]
    assert result["kl_mean"] < 5e-3


def test_goes_to_other_processes(build):
    cache = build()
    there = pickle.loads(pickle.dumps(cache))
    assert torch.equal(there.log_probs([3]), cache.log_probs([3]))


class TestDamage:
    @pytest.fixture
    def shard(self, build, tmp_path):
        build()
        return next((tmp_path / "cache").glob("shard-*.parquet"))

    def test_a_flipped_byte_is_found_and_named_and_mended(self, build, shard, passes):
        for path in (shard.parent / "basis.safetensors", shard):
            data = path.read_bytes()
            for position in (10, len(data) // 2, len(data) - 20):
                changed = bytearray(data)
                changed[position] ^= 1
                path.write_bytes(changed)
                with pytest.raises(ValueError, match=f"{path.name} is damaged"):
                    TeacherCache(str(shard.parent))
            if path is not shard:
                path.write_bytes(data)
        passes.clear()
        assert len(build()) == 12
        assert sum(passes) == 12
        TeacherCache(str(shard.parent))

    def test_a_damaged_basis_takes_its_rows_with_it(self, build, shard, passes):
        """Rows mean nothing in other coordinates."""
        path = shard.parent / "basis.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\1\0")
        cache = build()
        row = cache.rows[0]
        expected = log_probs(
            tiny_model(seed=2), row["teacher_prompt_ids"] + row["completion_ids"], len(row["teacher_prompt_ids"])
        )
        assert kl(expected, cache.log_probs([0])) / len(expected) < 1e-3
        os.remove(path)
        passes.clear()
        assert len(build(answered_dataset(16))) == 16
        TeacherCache(str(shard.parent))

    def test_shards_of_another_cache_are_not_adopted(self, build, shard):
        os.remove(shard.parent / "manifest.json")
        with pytest.raises(ValueError, match="belongs to a cache that was made differently"):
            build(teacher=tiny_model(seed=3))


class TestTraining:
    def train(self, args, cache=None, dataset=None, **kwargs):
        source = {"teacher_cache": cache} if cache is not None else {"teacher_model": tiny_model(seed=2)}
        trainer = PrimedDistillTrainer(
            model=kwargs.pop("model", None) or tiny_model(seed=1),
            args=args,
            train_dataset=answered_dataset(12) if dataset is None else dataset,
            processing_class=kwargs.pop("processing_class", tiny_tokenizer()),
            priming=kwargs.pop("priming", PRIMING),
            **source,
            **kwargs,
        )
        trainer.train()
        return trainer

    @pytest.mark.parametrize("preset", ["tiny", "standard", "exact"])
    def test_padded_vocabularies_are_kept_as_cut_ones(self, build, make_primed_args, preset):
        """Entropies and draws are of real ids only, for the teacher and for the student."""
        tokenizer, logs = tiny_tokenizer(WORDS), []
        for size in (48, len(tokenizer)):
            student, teacher = tiny_model(seed=1, vocab_size=48), tiny_model(seed=2, vocab_size=48)
            for model in (student, teacher):
                model.resize_token_embeddings(size)
            cache = build(teacher=teacher, preset=preset, folder=f"cache{size}", processing_class=tokenizer)
            assert cache.manifest.vocab_size == len(tokenizer)
            args = make_primed_args(kd_beta=0.0, kd_temperature=1.0, alpha=0.0)
            trainer = self.train(args, cache, model=student, processing_class=tokenizer)
            logs.append(trainer.state.log_history[0])
        for name in ("loss", "kd", "entropy/teacher", "entropy/student"):
            assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-6), name

    def test_draws_of_padding_are_refused(self, build):
        cache = build(preset="tiny")
        cache.manifest.real_vocab_size = 30  # as an earlier version wrote it for a padded vocabulary
        with pytest.raises(ValueError, match="draws from 40 entries of the teacher's vocabulary, of which only 30"):
            cache.check_serves(1.0, 0.0, 0.0)

    @pytest.mark.parametrize(("beta", "temperature"), [(1.0, 5.942), (0.0, 1.0), (0.5, 2.0)])
    def test_exact_gives_the_losses_of_the_live_teacher(self, build, make_primed_args, beta, temperature):
        """In another order, on a subset, and with another accumulation than it was built with."""
        cache = build(teacher=tiny_model(seed=2))
        subset = answered_dataset(12).select([9, 3, 5, 1, 7, 2, 0, 8])
        histories = []
        for source in (None, cache.path):
            args = make_primed_args(
                kd_beta=beta, kd_temperature=temperature, max_steps=6, gradient_accumulation_steps=2, alpha=0.2
            )
            trainer = self.train(args, source, subset, eval_dataset=answered_dataset(4))
            histories.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
            histories[-1].append(trainer.evaluate()["eval_loss"])
        assert histories[1] == pytest.approx(histories[0], rel=5e-3)

    def test_tiny_is_the_forward_kl_on_average(self, build, make_primed_args):
        cache = build(answered_dataset(16), preset="tiny")
        losses = []
        for source in (None, cache):
            args = make_primed_args(
                kd_beta=0.0, kd_temperature=1.0, alpha=0.0, per_device_train_batch_size=16, learning_rate=0.0
            )
            losses.append(self.train(args, source, answered_dataset(16)).state.log_history[0]["loss"])
        assert losses[1] == pytest.approx(losses[0], rel=0.05)

    def test_the_teachers_answers_come_from_the_cache(self, build, make_primed_args):
        cache = build(prompt_dataset(5), response_source="teacher", max_new_tokens=6)
        trainer = self.train(make_primed_args(response_source="teacher"), cache, prompt_dataset(5))
        assert sorted(trainer.train_dataset["completion_ids"]) == sorted(cache.rows["completion_ids"])
        trainer = self.train(make_primed_args(), cache, cache.dataset())
        assert trainer.state.log_history[0]["loss"] > 0

    def test_other_rows_are_evaluated_and_predicted(self, build, make_primed_args):
        trainer = self.train(make_primed_args(), build(), eval_dataset=answered_dataset(3))
        loss = trainer.evaluate()["eval_loss"]
        assert trainer.evaluate(answered_dataset(3))["eval_loss"] == pytest.approx(loss, rel=1e-6)
        assert trainer.predict(answered_dataset(3)).metrics["test_loss"] == pytest.approx(loss, rel=1e-6)

    def test_model_card_names_the_cache(self, build, make_primed_args, tmp_path):
        trainer = self.train(make_primed_args(), build())
        trainer.create_model_card(model_name="x")
        assert (
            "from a teacher cache (preset `exact`, KL(teacher || kept) "
            in (tmp_path / "run" / "README.md").read_text()
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"priming": PrimingTemplate("green ")}, r"another priming: .*red blue .* there, .*green .* here"),
            ({"processing_class": tiny_tokenizer(["imagine", "a"])}, "another number of tokens: 40 there, 8 here"),
            ({"dataset": answered_dataset(13)}, r"1 of 13 rows in `train_dataset` are not in the .* cache.*Row 12"),
            ({"eval_dataset": answered_dataset(14)}, "2 of 14 rows in `eval_dataset`"),
            ({"args": {"kd_temperature": 5.0}, "preset": "standard"}, r"`kd_temperature` is 5\.0.*preset='exact'"),
            ({"args": {"response_source": "teacher"}}, r"the answers in the teacher cache at .* are the data's"),
            ({"args": {"kd_beta": 1.0}, "preset": "tiny"}, r"only serve the forward KL.*preset='standard'"),
            ({"args": {"kd_beta": 0.0, "skew": 0.1}, "preset": "tiny"}, "only serve the forward KL"),
            ({"data_collator": list}, "needs rows that the trainer prepares"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_any_weights(self, build, make_primed_args, change, message):
        change = {"args": {}, "preset": "exact", **change}
        cache, args = build(preset=change.pop("preset")), make_primed_args(**change.pop("args"))
        with pytest.raises(ValueError, match=message):
            self.train(args, cache, model="no/such-model", **change)

    def test_another_template_or_answer_is_refused_with_both_sides(self, build, make_primed_args):
        cache = build(chat_dataset(4))
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template += " "
        with pytest.raises(ValueError, match="another chat template"):
            self.train(make_primed_args(), cache, chat_dataset(4), processing_class=tokenizer)
        edited = chat_dataset(4).to_list()
        edited[2]["messages"][1]["content"] = "green"
        with pytest.raises(ValueError, match=r"Row 2: the answer is '[^']+ <eos>' there and 'green <eos>' here"):
            self.train(make_primed_args(), cache, type(chat_dataset(1)).from_list(edited))

    def test_another_length_limit_is_refused_with_both_sides(self, build, make_primed_args):
        cache = build(max_length=7)
        assert len(cache) < 12
        with pytest.raises(
            ValueError,
            match=r"built with max_length=7, teacher_max_length=None, this run has max_length=1024, teacher_m",
        ):
            self.train(make_primed_args(), cache)
        self.train(make_primed_args(max_length=7), cache)
        assert len(build()) == 12  # the same cache, grown


def test_keys_depend_on_where_the_prompt_ends():
    assert row_key([1, 2], [3]) != row_key([1], [2, 3])
