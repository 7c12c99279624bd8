"""Several teachers in one run: a row's column `teacher` names the one that teaches it."""

import copy

import pytest
import torch
from datasets import Dataset
from pooling_server import PoolingServer
from reference import greedy, primed_loss
from tiny import WORDS, answered_dataset, difference, prompt_dataset, save_models, tiny_model, tiny_tokenizer, weights
from trainers import GREEDY, SAVES, SGD, all_rows, equal, keep_windows, logged, lora, trained, trained_rows

from trl_promptkd import PrimingTemplate, build_teacher_cache


NAMES = ("math", "code")
PRIMINGS = {"math": PrimingTemplate("red blue "), "code": PrimingTemplate(" green", "suffix")}
RED, BLUE, GREEN = 23, 24, 25
WITHOUT_CLIPPING = {**SGD, "max_grad_norm": 0.0}


def named(dataset, *names):
    """The rows, with these teachers in turn."""
    return dataset.add_column("teacher", [names[row % len(names)] for row in range(len(dataset))])


def of(dataset, name):
    return dataset.filter(lambda row: row["teacher"] == name)


def two_teachers(**settings):
    return {"math": tiny_model(seed=2, **settings), "code": tiny_model(seed=3, num_hidden_layers=3, **settings)}


@pytest.fixture
def several(primed):
    """Makes a `PrimedDistillTrainer` with the teachers "math" and "code"."""

    def make(model=None, teachers=None, **settings):
        defaults = {"train_dataset": named(answered_dataset(), *NAMES), "priming": PRIMINGS}
        return primed(model, two_teachers() if teachers is None else teachers, **{**defaults, **settings})

    return make


def teacher_of(row):
    """By its priming text; a row is the student's prompt, the teacher's, and the completion."""
    prompt, teacher_prompt, _ = row
    return {(RED, BLUE, *prompt): "math", (*prompt, GREEN): "code"}[tuple(teacher_prompt)]


class TestOneStep:
    @pytest.mark.parametrize("beta", [1.0, 0.0, 0.3])
    def test_equals_rows_alone(self, several, beta):
        """Against the row-by-row implementation in `reference.py`: losses, gradients and metrics."""
        student, teachers = tiny_model(seed=1), two_teachers()
        reference, before = copy.deepcopy(student), {name: weights(one) for name, one in teachers.items()}
        shape = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "loss_chunk_size": 5}
        trainer = several(student, teachers, kd_beta=beta, **shape, **WITHOUT_CLIPPING)
        args, rows = trainer.args, trained_rows(trainer)
        own = {name: [row for row in rows if teacher_of(row) == name] for name in NAMES}
        assert min(map(len, own.values())) > 0
        sums = {
            name: primed_loss(reference, teachers[name], own[name], args.alpha, args.kd_temperature, beta)
            for name in NAMES
        }
        counts = {name: sum(len(row[2]) for row in own[name]) for name in NAMES}
        count = sum(counts.values())
        loss = sum(sums[name]["loss"] for name in NAMES) / count
        loss.backward()
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
        for name, parameter in reference.named_parameters():
            expected = parameter.detach() - 0.05 * parameter.grad
            assert (weights(trainer.model)[name] - expected).abs().max() < 1e-5, name
        for name in NAMES:
            assert log[f"kl/student_teacher/{name}"] == pytest.approx(sums[name]["kl"] / counts[name], rel=1e-3)
            assert log[f"teacher/top1_agreement/{name}"] == pytest.approx(sums[name]["agree"] / counts[name])
            assert log[f"completion_tokens/{name}"] == counts[name]
            assert difference(weights(teachers[name]), before[name]) == 0
        assert log["kl/student_teacher"] == pytest.approx(sum(s["kl"] for s in sums.values()) / count, rel=1e-3)
        assert log["completion_tokens"] == count

    def test_the_gain_is_of_each_teachers_own_text(self, several):
        teachers = two_teachers()
        trainer = several(teachers=teachers, priming={**PRIMINGS, "code": None}, per_device_train_batch_size=4)
        windows = keep_windows(trainer)
        trainer.train()
        rows = [row for row in all_rows(windows) if row[0] != row[1]]
        assert len(rows) == 2
        expected = primed_loss(teachers["math"], teachers["math"], rows, 0.5, 1.0)["gain"]
        log = trainer.state.log_history[0]
        assert "priming/gain_nats/code" not in log
        for name in ("priming/gain_nats", "priming/gain_nats/math"):
            assert log[name] == pytest.approx(expected / sum(len(row[2]) for row in rows), rel=1e-3)

    @pytest.mark.parametrize("sizes", [(40, 40), (40, 64), (64, 48)])
    def test_gradients_are_the_sum_of_runs_with_each_teacher_alone(self, primed, several, sizes):
        """The tokenizer has 26 tokens, and each model a padded vocabulary of its own size."""
        teachers = {
            name: tiny_model(seed=seed, vocab_size=size) for name, seed, size in zip(NAMES, (2, 3), sizes, strict=True)
        }
        tokenizer = tiny_tokenizer(WORDS)
        assert len(tokenizer) < 40
        data = named(answered_dataset(), *NAMES)
        settings = {**WITHOUT_CLIPPING, "per_device_train_batch_size": 8, "processing_class": tokenizer}
        start = weights(tiny_model(seed=1, vocab_size=48))
        moved, total = dict.fromkeys(start, 0.0), 0.0
        for name in NAMES:
            parts = {"train_dataset": of(data, name), "priming": PRIMINGS[name]}
            alone = primed(tiny_model(seed=1, vocab_size=48), teachers[name], **parts, **settings)
            alone.train()
            log, after = alone.state.log_history[0], weights(alone.model)
            moved = {key: value + log["completion_tokens"] * (after[key] - start[key]) for key, value in moved.items()}
            total += log["completion_tokens"] * log["loss"]
        both = several(tiny_model(seed=1, vocab_size=48), teachers, train_dataset=data, **settings)
        both.train()
        log, after = both.state.log_history[0], weights(both.model)
        count = log["completion_tokens"]
        assert log["loss"] == pytest.approx(total / count, rel=1e-5)
        for key, value in moved.items():
            assert (count * (after[key] - start[key]) - value).abs().max() < 1e-4 * max(float(value.abs().max()), 1)


class TestTeachers:
    def test_one_of_them_may_be_the_students_own_start(self, several):
        """Below the adapter: no second copy of the weights."""
        student = tiny_model(seed=1)
        start = copy.deepcopy(student)
        teachers = {"math": tiny_model(seed=2), "code": None}
        trainer = several(student, teachers, peft_config=lora(), per_device_train_batch_size=4)
        rows = trained_rows(trainer)
        assert trainer.teacher_model["code"] is None
        own = [row for row in rows if teacher_of(row) == "code"]
        expected = primed_loss(start, start, own, 0.5, trainer.args.kd_temperature)["kl"]
        log = trainer.state.log_history[0]
        assert log["kl/student_teacher/code"] == pytest.approx(expected / sum(len(row[2]) for row in own), rel=1e-3)

    def test_a_model_under_two_names_is_held_once(self, several, tmp_path):
        model = tiny_model(seed=2)
        model.save_pretrained(tmp_path / "teacher")
        tiny_tokenizer().save_pretrained(tmp_path / "teacher")
        logs = []
        for one in (model, str(tmp_path / "teacher")):
            trainer = several(teachers=dict.fromkeys(NAMES, one), per_device_train_batch_size=4)
            assert trainer.teacher_model["math"] is trainer.teacher_model["code"]
            trainer.train()
            logs.append(trainer.state.log_history[0])
        for name in NAMES:
            assert logs[0][f"priming/gain_nats/{name}"] == pytest.approx(logs[1][f"priming/gain_nats/{name}"])

    def test_one_writes_its_answers_and_the_other_has_written_them_into_a_cache(self, several, tmp_path):
        teachers, data = two_teachers(), named(answered_dataset(), *NAMES)
        parts = (tiny_tokenizer(), PRIMINGS["code"], "exact", "teacher")
        cache = build_teacher_cache(teachers["code"], of(data, "code"), str(tmp_path / "cache"), *parts)
        settings = {"response_source": "teacher", "train_dataset": data, "eval_dataset": data}
        mixed = several(teachers={"math": teachers["math"]}, teacher_cache={"code": cache}, **settings)
        written = {tuple(row["completion_ids"]) for row in cache.rows}
        rows = [row for row in mixed.train_dataset if row["teacher"] == "code"]
        assert {tuple(row["completion_ids"]) for row in rows} == written
        mixed.train()
        assert mixed.evaluate()["eval_loss"] > 0

    @pytest.mark.parametrize("preset", ["exact", "tiny"])
    def test_a_cached_one_says_what_it_says_alone(self, primed, several, tmp_path, preset):
        """Draws too, whose missing entropy is put back for their rows only."""
        teachers, data = two_teachers(), named(answered_dataset(), *NAMES)
        parts = (tiny_tokenizer(), PRIMINGS["code"], preset)
        cache = build_teacher_cache(teachers["code"], of(data, "code"), str(tmp_path / "cache"), *parts)
        settings = {"kd_temperature": 1.0, "kd_beta": 0.0, "per_device_train_batch_size": 8, **WITHOUT_CLIPPING}
        runs = {
            "math": {"teacher_model": teachers["math"]},
            "code": {"teacher_model": None, "teacher_cache": cache},
        }
        total = 0.0
        for name, one in runs.items():
            alone = primed(train_dataset=of(data, name), priming=PRIMINGS[name], **one, **settings)
            alone.train()
            total += alone.state.log_history[0]["loss"] * alone.state.log_history[0]["completion_tokens"]
        mixed = several(
            teachers={"math": teachers["math"]}, teacher_cache={"code": cache}, train_dataset=data, **settings
        )
        assert mixed.teacher_cache == {"code": cache}
        assert [row["teacher"] for row in mixed.train_dataset] == data["teacher"][:]
        mixed.train()
        log = mixed.state.log_history[0]
        assert log["loss"] * log["completion_tokens"] == pytest.approx(total, rel=1e-5)
        assert "priming/gain_nats/math" in log
        assert "priming/gain_nats/code" not in log

    @pytest.mark.parametrize("source", ["dataset", "student"])
    def test_a_served_one_says_what_it_says_beside_the_student(self, several, tmp_path, source):
        """Its rows of a window are sent ahead, and each of them once."""
        teachers, folder = two_teachers(), str(tmp_path / "code")
        save_models(tmp_path, code=teachers["code"])
        settings = {"response_source": source, "max_steps": 3, "gradient_accumulation_steps": 2, **SGD}
        settings |= {"generation_kwargs": GREEDY, "teacher_server_dtype": "float32"}
        live = several(teachers=teachers, **settings)
        with PoolingServer(teachers["code"], name=folder) as server:
            mixed = several(
                teachers={"math": teachers["math"], "code": folder}, teacher_server={"code": server.url}, **settings
            )
            windows = keep_windows(mixed)
            live.train(), mixed.train()
        assert difference(weights(live.model), weights(mixed.model)) < 1e-5
        for name in ("kl/student_teacher/math", "kl/student_teacher/code", "priming/gain_nats/code"):
            assert logged(mixed, name) == pytest.approx(logged(live, name), rel=1e-3)
        sent = [tuple(row) for row in server.rows]
        wholes = [((*row[1], *row[2][:-1]), teacher_of(row)) for row in all_rows(windows)]
        for whole, name in wholes:
            assert sent.count(whole) == (wholes.count((whole, name)) if name == "code" else 0)
        assert mixed.teacher_model["code"] is None
        mixed.create_model_card("x")
        assert "**code**: `code` on a server, which saw" in (tmp_path / "run" / "README.md").read_text()

    def test_a_teacher_that_no_row_names_is_warned_about(self, several, caplog, propagate):
        several(train_dataset=named(answered_dataset(), "math"))
        assert "No row of `train_dataset` names the teacher 'code'" in caplog.text

    def test_only_its_own_rows_must_fit_a_teacher(self, several):
        teachers = {"math": tiny_model("gpt2", seed=2), "code": tiny_model("gpt2", seed=3, n_positions=12)}
        long = {"prompt": "the cat " * 8, "completion": " sat"}
        rows = [{**long, "teacher": "math"}, {"prompt": "the cat", "completion": " sat", "teacher": "code"}]
        several(teachers=teachers, train_dataset=Dataset.from_list(rows))
        with pytest.raises(ValueError, match="The teacher 'code' has 12 positions, but the longest row needs"):
            several(teachers=teachers, train_dataset=Dataset.from_list([*rows, {**long, "teacher": "code"}]))

    def test_with_one_teacher_the_column_is_a_variable_of_the_template(self, primed):
        data = named(answered_dataset(), "red", "green")
        rows = trained_rows(primed(train_dataset=data, priming=PrimingTemplate("{{ teacher }} ")))
        assert {teacher_prompt[0] for _, teacher_prompt, _ in rows} == {RED, GREEN}

    def test_a_template_sees_the_column_and_needs_only_its_own_rows_columns(self, several):
        primings = {"math": PrimingTemplate("{{ teacher }} {{ level }} "), "code": PrimingTemplate("green ")}
        rows = [{"prompt": "the cat", "completion": " sat", "teacher": "math", "level": "red"}]
        trainer = several(
            train_dataset=Dataset.from_list(rows),
            eval_dataset=named(answered_dataset(2), "code"),
            priming=primings,
        )
        assert trainer.train_dataset["teacher_prompt_ids"][0][1] == RED
        with pytest.raises(ValueError, match="uses 'level', which `eval_dataset` does not have"):
            trainer.evaluate(named(answered_dataset(2), "math"))

    def test_one_text_for_all(self, several):
        rows = trained_rows(several(priming=PrimingTemplate("red "), remove_unused_columns=True, shuffle_dataset=True))
        assert {teacher_prompt[0] for _, teacher_prompt, _ in rows} == {RED}

    def test_each_teacher_expects_its_own_rows_of_a_window(self, several):
        trainer = several(per_device_train_batch_size=4)
        heard = {name: [] for name in NAMES}
        for name, teacher in trainer.teacher.teachers.items():
            teacher.expect = heard[name].append
        whole, own = (trainer.data_collator([trainer.train_dataset[row] for row in rows]) for rows in ([0, 1, 2], [1]))
        trainer.teacher.expect([whole, own])
        assert [batch["teachers"].tolist() for batch in heard["math"][0]] == [[0, 0]]
        assert [batch["teachers"].tolist() for batch in heard["code"][0]] == [[1], [1]]
        assert torch.equal(heard["math"][0][0]["teacher_input_ids"], whole["teacher_input_ids"][[0, 2]])


class TestSources:
    def test_each_teacher_writes_its_own_rows_answers(self, several):
        teachers = two_teachers()
        settings = {"response_source": "teacher", "generation_kwargs": GREEDY, "max_steps": 4}
        data = named(prompt_dataset(), *NAMES)
        trainer = several(teachers=teachers, train_dataset=data, eval_dataset=data.select([1, 2]), **settings)
        prompts = [tiny_tokenizer()(prompt)["input_ids"] for prompt in data["prompt"]]
        assert trainer.train_dataset["prompt_ids"][:] == prompts
        rows = trained_rows(trainer)
        assert len(rows) == 8
        for row in rows:
            assert row[2] == greedy(teachers[teacher_of(row)], row[1], 6, 0)
        assert trainer.evaluate()["eval_loss"] > 0

    def test_the_students_samples_are_judged_by_the_teacher_of_their_prompt(self, several):
        """Rows of a window are shared out by length, and take their teachers with them."""
        student, teachers = tiny_model(seed=1), two_teachers()
        reference = copy.deepcopy(student)
        settings = {"response_source": "student", "generation_kwargs": GREEDY, "gradient_accumulation_steps": 2}
        data = named(prompt_dataset(), *NAMES)
        trainer = several(student, teachers, train_dataset=data, eval_dataset=data, **settings)
        metrics = trainer.evaluate()
        rows = trained_rows(trainer)
        expected = dict.fromkeys(NAMES, 0.0)
        for row in rows:
            name = teacher_of(row)
            asked = data["teacher"][[tiny_tokenizer()(p)["input_ids"] for p in data["prompt"]].index(row[0])]
            assert name == asked
            expected[name] += primed_loss(reference, teachers[name], [row], 0.0, trainer.args.kd_temperature)["kl"]
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        for name in NAMES:
            count = sum(len(row[2]) for row in rows if teacher_of(row) == name)
            assert log[f"kl/student_teacher/{name}"] == pytest.approx(expected[name] / count, rel=1e-3)
            assert metrics[f"eval_kl/student_teacher/{name}"] > 0

    def test_streamed_rows(self, several):
        data = named(answered_dataset(), *NAMES)
        settings = {"train_sampling_strategy": "sequential", "max_steps": 2}
        whole, streamed = (
            trained(several(train_dataset=rows, **settings)) for rows in (data, data.to_iterable_dataset())
        )
        assert equal(whole, streamed)


class TestEvaluation:
    def test_each_teachers_share_of_a_set_and_of_several_sets(self, several):
        student, teachers = tiny_model(seed=1), two_teachers()
        data = named(answered_dataset(5), *NAMES)
        trainer = several(student, teachers, eval_dataset={"a": data, "b": of(data, "code")})
        metrics = trainer.evaluate()
        tokenizer, temperature = tiny_tokenizer(), trainer.args.kd_temperature
        for name in NAMES:
            rows = []
            for row in of(data, name):
                prompt = tokenizer(row["prompt"])["input_ids"]
                primed_prompt = [RED, BLUE, *prompt] if name == "math" else [*prompt, GREEN]
                rows.append((prompt, primed_prompt, [*tokenizer(row["completion"])["input_ids"], 0]))
            with torch.no_grad():
                expected = primed_loss(student, teachers[name], rows, 0.5, temperature)
            count = sum(len(row[2]) for row in rows)
            assert metrics[f"eval_a_kl/student_teacher/{name}"] == pytest.approx(expected["kl"] / count, rel=1e-3)
            agreement = metrics[f"eval_a_teacher/top1_agreement/{name}"]
            assert agreement == pytest.approx(expected["agree"] / count)
        same = [metrics[f"eval_{part}_kl/student_teacher/code"] for part in "ab"]
        assert same[0] == pytest.approx(same[1], rel=1e-4)
        assert "eval_b_kl/student_teacher/math" not in metrics
        again = trainer.evaluate(trainer.eval_dataset["a"])  # rows that are tokenized already keep their teacher
        assert again["eval_loss"] == pytest.approx(metrics["eval_a_loss"], rel=1e-5)

    def test_the_best_checkpoint_has_the_lowest_kl_to_a_teacher(self, several):
        args = several(metric_for_best_model="eval_kl/student_teacher/math").args
        assert args.greater_is_better is False

    def test_a_run_that_resumes_equals_one_that_does_not(self, several):
        settings = {**SAVES, "max_steps": 3, "learning_rate": 0.01}
        whole = trained(trainer := several(**settings))
        resumed = several(**settings)
        resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
        assert equal(whole, weights(resumed.model))
        mine, theirs = (run.state.log_history[-2] for run in (trainer, resumed))
        assert theirs["loss"] == mine["loss"]


class TestQuantizationReceipt:
    def test_is_of_the_teacher_that_is_named_and_its_rows(self, several, tmp_path):
        pytest.importorskip("bitsandbytes")
        tiny_model(seed=2, hidden_size=64, intermediate_size=64, num_key_value_heads=4).save_pretrained(tmp_path)
        quantized = {"quantization_config": {"load_in_4bit": True}}
        teachers = {"math": str(tmp_path), "code": tiny_model(seed=3)}
        data = named(answered_dataset(), "math", "code", "code", "code")
        trainer = several(teachers=teachers, train_dataset=data, teacher_model_init_kwargs=quantized)
        assert trainer.quantization_receipt(teacher="math")["num_rows"] == 2
        with pytest.raises(ValueError, match="The teacher is not quantized"):
            trainer.quantization_receipt(teacher="code")
        with pytest.raises(ValueError, match="`teacher` is None; the teachers are 'math', 'code'"):
            trainer.quantization_receipt()

    def test_one_teacher_has_no_name(self, primed):
        with pytest.raises(ValueError, match="`teacher` is 'math'; there is one teacher"):
            primed().quantization_receipt(teacher="math")


class TestModelCard:
    def test_names_each_teacher_with_what_it_saw(self, several, tmp_path):
        data = named(answered_dataset(), "math", "code", "own")
        parts = (tiny_tokenizer(), PRIMINGS["code"], "exact")
        cache = build_teacher_cache(tiny_model(seed=3), of(data, "code"), str(tmp_path / "kept"), *parts)
        teacher = tiny_model(seed=2)
        teacher.config._name_or_path = "lab/mathematician"
        trainer = several(
            teachers={"math": teacher, "own": None},
            teacher_cache={"code": cache},
            train_dataset=data,
            priming={**PRIMINGS, "own": None},
        )
        trainer.create_model_card("x")
        card = (tmp_path / "run" / "README.md").read_text()
        assert (
            "**math**: [lab/mathematician](https://huggingface.co/lab/mathematician), which saw this text before"
            in card
        )
        assert "before the question" in card
        assert "\n```\nred blue \n```\n" in card
        assert "**code**: `a model without a name`, from a teacher cache (preset `exact`" in card
        assert "which saw this text after the question" in card
        assert "**own**: the student's own starting weights (self-distillation), which saw the prompts as they" in card


class TestRefusals:
    """Before weights are loaded. See also tests/refusals/bad_teachers.py."""

    def test_rows_that_the_teachers_cache_does_not_hold(self, several, tmp_path):
        data = named(answered_dataset(), *NAMES)
        parts = (tiny_tokenizer(), PRIMINGS["code"], "standard")
        cache = build_teacher_cache(tiny_model(seed=3), of(data, "code").select([0]), str(tmp_path / "cache"), *parts)
        message = r"3 of 4 rows in `train_dataset \(teacher 'code'\)` are not in the teacher cache"
        with pytest.raises(ValueError, match=message):
            several(teachers={"math": tiny_model(seed=2)}, teacher_cache={"code": cache}, kd_temperature=1.0)

    def test_a_cache_made_with_another_text_names_its_teacher(self, several, tmp_path):
        data = named(answered_dataset(), *NAMES)
        parts = (tiny_tokenizer(), PRIMINGS["math"], "standard")
        cache = build_teacher_cache(tiny_model(seed=3), of(data, "code"), str(tmp_path / "cache"), *parts)
        with pytest.raises(ValueError, match="Teacher 'code': The teacher cache was made with another priming"):
            several(teachers={"math": tiny_model(seed=2)}, teacher_cache={"code": cache}, kd_temperature=1.0)

    def test_another_tokenizer_names_its_teacher(self, several, tmp_path):
        tiny_model(seed=2).save_pretrained(tmp_path)
        tiny_tokenizer(WORDS[::-1]).save_pretrained(tmp_path)
        message = r"different tokenizers.*Found in `teacher_model\['code'\]`"
        with pytest.raises(ValueError, match=message):
            several(teachers={"math": tiny_model(seed=3), "code": str(tmp_path)})

    def test_a_teacher_that_is_not_finite_is_named(self, several):
        teachers = two_teachers()
        trainer = several(teachers=teachers, per_device_train_batch_size=4)
        with torch.no_grad():
            teachers["code"].get_decoder().norm.weight.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match=r"Not finite already: the hidden states of the teacher 'code'\."):
            trainer.train()
