import copy
import json
import re
from functools import partial

import pytest
import torch
import yaml
from datasets import Dataset
from paths import ROOT
from peft import LoraConfig, get_peft_model
from tiny import CHAT_TEMPLATE, CONFIGS, WORDS, difference, save_models, save_rows, tiny_model, tiny_tokenizer, weights
from torch.nn.functional import dropout
from transformers import GenerationConfig, GPT2LMHeadModel, GPT2Model, LlamaModel

from trl_promptkd import PrimedDistillConfig, PrimingTemplate, PromptKDConfig
from trl_promptkd.cli import main, parse_args
from trl_promptkd.cli.doctor import parse
from trl_promptkd.data import pad_rows, tokenize_primed_row, tokenize_row
from trl_promptkd.data.priming import resolve_priming
from trl_promptkd.doctor import diagnose, passed
from trl_promptkd.doctor import memory as memory_module
from trl_promptkd.generation.rollouts import generate_completions
from trl_promptkd.models import teacher as teacher_module
from trl_promptkd.models.teacher import load_teacher


PROMPTS = [" ".join(WORDS[i : i + 2 + i % 4]) for i in range(8)]


def pair(family="llama"):
    """A student that is the teacher, slightly disturbed: it is worse on the teacher's own answers."""
    teacher = tiny_model(family, seed=1)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    return student, teacher


def answered_rows(teacher, tokenizer, conversational=False, priming=None):
    """Rows whose answers the (primed) teacher has written."""
    rows = [{"prompt": [{"role": "user", "content": text}] if conversational else text} for text in PROMPTS]
    prompts = [tokenize_primed_row(row, tokenizer, resolve_priming(priming))["teacher_prompt_ids"] for row in rows]
    config = GenerationConfig(max_new_tokens=8, min_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=[0])
    answers = generate_completions(teacher, prompts, config, vocab_size=len(tokenizer))
    for row, ids in zip(rows, answers, strict=True):
        text = tokenizer.decode([token for token in ids if token])
        row["completion"] = [{"role": "assistant", "content": text}] if conversational else " " + text
    return rows


def healthy(family="llama", **changes):
    """Arguments of `diagnose` that nothing is wrong with; settings of the run among them, see [`findings_of`]."""
    student, teacher = pair(family)
    tokenizer = tiny_tokenizer()
    return {
        "model": student,
        "teacher": teacher,
        "dataset": answered_rows(teacher, tokenizer),
        "processing_class": tokenizer,
        "teacher_processing_class": tiny_tokenizer(),
        "max_new_tokens": 16,
        **changes,
    }


def diagnosed(arguments):
    """What fields of the configuration are among the arguments is its."""
    kind = PromptKDConfig if arguments.get("priming") is None else PrimedDistillConfig
    known = {name: value for name, value in arguments.items() if name not in kind.__dataclass_fields__}
    settings = {name: value for name, value in arguments.items() if name not in known}
    return diagnose(**known, args=kind(bf16=False, use_cpu=True, **settings))


def findings_of(arguments):
    return {finding.name: finding for finding in diagnosed(arguments)}


def hook(module, change):
    module.register_forward_hook(lambda _, __, output: change(output))


class BlindGPT2(GPT2LMHeadModel):
    """Takes position ids and does not use them."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class BlindGPT2Decoder(GPT2Model):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        kwargs.pop("position_ids", None)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class WeakLlama(LlamaModel):
    """Passes on a share of the gradient, as weights that were repacked for inference may do."""

    share = 0.1

    def forward(self, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None:
            inputs_embeds = self.share * inputs_embeds + (1 - self.share) * inputs_embeds.detach()
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class DetachedLlama(WeakLlama):
    share = 0.0


def of_class(module, cls):
    module.__class__ = cls


def own_collator(change, rows):
    ids = [tokenize_row(row, tiny_tokenizer()) for row in rows]
    batch = pad_rows([row["prompt_ids"] for row in ids], [row["completion_ids"] for row in ids], 0)
    change(batch)
    return batch


def mask_padding_by_id(batch):
    batch["labels"][batch["labels"] == 0] = -100


def mask_first_answer_token(batch):
    first = (batch["labels"] != -100).int().argmax(dim=1, keepdim=True)
    batch["labels"].scatter_(1, first, -100)


def train_on_prompts(batch):
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    batch["labels"][:, :2] = -100


def shift_labels(batch):
    batch["labels"] = batch["labels"].roll(-1, dims=1)


def collator(change):
    return given(data_collator=partial(own_collator, change))


def given(**changes):
    return lambda case: case.update(changes)


def chat(case, template=CHAT_TEMPLATE):
    case["dataset"] = answered_rows(case["teacher"], case["processing_class"], conversational=True)
    case["processing_class"].chat_template = template


def changing_template(case):
    chat(case, "{% if messages[-1]['role'] == 'assistant' %}<system> {% endif %}" + CHAT_TEMPLATE)


def without_end(case):
    """The template of a tokenizer whose answers do not end with what generation stops at."""
    chat(case, CHAT_TEMPLATE.replace("<eos>", "<pad>"))
    case["lmbda"] = 0.5


def deaf_template(case):
    chat(case, CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'system'"))
    case["priming"] = PrimingTemplate("red blue", placement="system")


def without_padding(family):
    def change(case):
        case["model"], case["teacher"] = pair(family)
        case["priming"], case["padding_free"] = "ground_truth", True

    return change


def nan_weight(case):
    case["teacher"].lm_head.weight.data[3, 3] = float("nan")


def logit_set(token, value):
    return lambda output: output.index_fill(-1, torch.tensor([token]), value)


def rows_that_see_each_other(case):
    hook(case["model"].model.norm, lambda x: x - 0.1 * x.mean(dim=(0, 1)))


def doubled_start(case):
    case["processing_class"].bos_token = "<system>"
    case["dataset"] = [{"prompt": f"<system> <system> {prompt}"} for prompt in PROMPTS]


def no_eos(case):
    case["processing_class"].eos_token = None
    case["processing_class"].pad_token = "<pad>"


def mixed_types(case):
    case["dataset"] = answered_rows(case["teacher"], case["processing_class"], conversational=True)
    (message,) = case["dataset"][0]["prompt"]
    case["dataset"][0]["prompt"] = [{**message, "content": [{"type": "text", "text": message["content"]}]}]


def tokenized(case):
    rows = [tokenize_row(row, case["processing_class"]) for row in case["dataset"]]
    case.update(dataset=Dataset.from_list(rows), lmbda=0.5)


def unanswered(case):
    case["dataset"][3].update(completion=None)
    case["lmbda"] = 0.5


# (the check that must find it, its status, what it must say, how to break a healthy case); of learned positions first
LEARNED = [
    ("padding_teacher", "fail", "whole rows, padded", lambda c: of_class(c["teacher"], BlindGPT2)),
    ("padding_student", "fail", "whole rows, padded", lambda c: of_class(c["model"], BlindGPT2)),
    ("padding_soft_prompt", "fail", "padded, is off", lambda c: of_class(c["teacher"].transformer, BlindGPT2Decoder)),
    ("positions", "fail", "128 positions", given(max_new_tokens=124)),
]
BROKEN = [
    ("trained_tokens", "fail", r"\b8 not up to their end", collator(mask_padding_by_id)),
    ("trained_tokens", "fail", r"\b8 are not trained on from", collator(mask_first_answer_token)),
    ("trained_tokens", "warn", "other tokens", collator(train_on_prompts)),
    ("trained_tokens", "fail", "not to be shifted", collator(shift_labels)),
    ("trained_tokens", "fail", "KeyError", collator(lambda batch: batch.pop("labels"))),
    (
        *("tokenizers", "fail", r"id 9, which is 'a' .* and 'an'"),
        given(teacher_processing_class=tiny_tokenizer([*WORDS[:3], "an", *WORDS[4:]])),
    ),
    ("tokenizers", "warn", "no tokenizer", given(teacher_processing_class=None)),
    ("chat_template", "fail", "Row 0: .*differently once", lambda c: (changing_template(c), c.update(lmbda=0.5))),
    ("chat_template", "warn", "in 8 of 8 rows .*differently once", changing_template),
    ("chat_template", "fail", "no chat template", lambda c: chat(c, None)),
    ("trained_tokens", "fail", "8 of 8 answers do not end", without_end),
    ("chat_template", "warn", "8 of 8 prompts begin with '<system>' twice", doubled_start),
    ("repeatability", "fail", "two passes", lambda c: hook(c["teacher"].model.norm, lambda x: dropout(x, 0.1))),
    ("finite_logits", "fail", "of the teacher are NaN", nan_weight),
    ("soft_prompt_gradient", "fail", "what the gradient says", lambda c: of_class(c["teacher"].model, WeakLlama)),
    ("soft_prompt_gradient", "fail", "norm is 0", lambda c: of_class(c["teacher"].model, DetachedLlama)),
    ("vocabulary", "fail", "20 entries", given(teacher=tiny_model(vocab_size=20))),
    ("lengths", "fail", "do not fit into `max_length=4`", given(max_length=4, lmbda=0.5)),
    ("lengths", "warn", "4 of 8 rows do not fit into `max_length=4`", given(max_length=4, lmbda=0.5, overlong="drop")),
    ("lengths", "warn", r"\d of 8 answers are cut", given(max_length=8, lmbda=0.5)),
    ("data", "fail", "prompts without answers", given(dataset=[{"prompt": text} for text in PROMPTS], lmbda=0.5)),
    ("data", "fail", "of 8 rows, 1 have no answer", unanswered),
    ("data", "warn", "1 an empty one", lambda c: c["dataset"][3].update(completion=" ")),
    ("data", "fail", "prompt of 1 of 8 rows is None", lambda c: c["dataset"][3].update(prompt=None)),
    ("data", "fail", "neither a `messages`", given(dataset=[{"question": "who"}])),
    ("priming", "fail", "does not reach the teacher", deaf_template),
    ("priming", "fail", "'topic'", given(priming=PrimingTemplate("{{ topic }} "))),
    ("priming", "warn", "8 of 8 rows", given(priming=PrimingTemplate("{{ '' }}"))),
    ("padding_student", "fail", "padded, is off", rows_that_see_each_other),
    ("padding_student", "fail", "of the loss, padding-free, is off", without_padding("opt")),
    ("window_split", "fail", "gradients", rows_that_see_each_other),
    ("special_tokens", "fail", "no end-of-text token", no_eos),
    (
        *("special_tokens", "warn", "student was published to stop at {5: '<pad>'}"),
        lambda c: setattr(c["model"].generation_config, "eos_token_id", 5),
    ),
    ("sampling", "warn", "4 of 4", lambda c: hook(c["model"].lm_head, logit_set(0, 100.0))),
    ("quality", "warn", "answers cost", lambda c: c.update(model=c["teacher"], teacher=c["model"])),
    ("quality", "warn", "answers cost", lambda c: c.update(model=copy.deepcopy(c["teacher"]))),
    ("quality", "warn", r"teacher\) \d", lambda c: hook(c["model"].lm_head, lambda x: -3 * x)),
    ("memory", "warn", "a window of 1000000 rows", given(per_device_train_batch_size=1_000_000)),
]


def four_bit_teacher(folder):
    pytest.importorskip("bitsandbytes")
    tiny_model(seed=1, hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return load_teacher(folder, {"quantization_config": {"load_in_4bit": True}, "dtype": "float32"})


class TestBroken:
    @pytest.mark.parametrize(
        ("family", "check", "status", "says", "breaks"),
        [*(("gpt2", *case) for case in LEARNED), *(("llama", *case) for case in BROKEN)],
    )
    def test_a_broken_setup_is_found(self, family, check, status, says, breaks):
        arguments = healthy(family)
        breaks(arguments)
        findings = findings_of(arguments)
        assert findings[check].status == status, findings[check]
        assert re.search(says, findings[check].found), findings[check].found
        assert findings[check].advice or findings[check].values.get("exception")
        assert passed(findings.values()) == all(finding.status != "fail" for finding in findings.values())
        for finding in findings.values():
            expected = "KeyError" if says == "KeyError" else "ValueError"
            assert finding.values.get("exception", expected) == expected, finding

    def test_a_four_bit_teacher_that_is_packed_for_inference(self, tmp_path, monkeypatch):
        """What happens if freezing a teacher does not undo it."""
        monkeypatch.setattr(teacher_module, "keep_four_bit_weights_differentiable", lambda model: 0)
        arguments = healthy(teacher=four_bit_teacher(tmp_path))
        if not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in arguments["teacher"].modules()):
            pytest.skip("this CPU has no AVX512-BF16: nothing is ever packed")
        assert findings_of(arguments)["soft_prompt_gradient"].status == "fail"

    def test_what_needs_a_failed_check_is_left_out_with_a_word(self):
        arguments = healthy()
        nan_weight(arguments)
        findings = findings_of(arguments)
        assert findings["padding_student"].status == "skip"
        assert findings["padding_student"].found == "left out, as finite_logits did not pass"
        assert findings["soft_prompt_gradient"].found == "left out, as repeatability did not pass"
        assert findings["memory"].status == "pass"

    def test_a_priming_text_and_another_trainers_configuration_are_refused(self):
        with pytest.raises(ValueError, match="`priming` is given, but `args` is a PromptKDConfig"):
            diagnose(
                *(tiny_model(), None, [{"prompt": "red"}], tiny_tokenizer()),
                args=PromptKDConfig(bf16=False, use_cpu=True),
                priming="teacher",
            )

    @pytest.mark.parametrize("bad", [{"rows": 0}, {"dataset": []}, {"priming": "nobody"}])
    def test_arguments_that_are_none_are_refused(self, bad):
        with pytest.raises(ValueError, match=r"`rows` is 0|`dataset` is empty|'nobody'"):
            diagnosed(healthy(**bad))


class TestHealthy:
    def assert_all_pass(self, arguments, *expected):
        findings = findings_of(arguments)
        assert {name: f for name, f in findings.items() if f.status != "pass"} == {}
        assert set(expected) <= set(findings)
        return findings

    @pytest.mark.parametrize("family", sorted(CONFIGS))
    def test_promptkd(self, family):
        """Answers are needed and there."""
        everything = ["trained_tokens", "padding_soft_prompt", "soft_prompt_gradient", "window_split", "quality"]
        findings = self.assert_all_pass(healthy(family, lmbda=0.5), *everything)
        assert 0.3 < findings["trained_tokens"].values["share"] < 1
        assert len(findings) == 18
        # Learned positions that are counted through padding, as `GKDTrainer` does, make a difference
        gap = findings["padding_student"].values["difference_without_position_ids"]
        assert family != "gpt2" or gap > 0.1
        assert family != "llama" or gap < 1e-3

    @pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min])
    def test_tokens_that_are_ruled_out_are_left_out(self, value):
        arguments = healthy(lmbda=0.5)
        hook(arguments["teacher"].lm_head, logit_set(5, value))
        findings = findings_of(arguments)
        # The answers hold that token, which the teacher would never write
        assert {name for name, finding in findings.items() if finding.status != "pass"} == {"quality"}
        assert "0 by the student and 1 by the teacher" in findings["finite_logits"].found
        assert 0 < findings["quality"].values["reverse_kl"] < 100

    def test_a_message_with_tool_calls_only_says_something(self):
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
        rows = [{"prompt": [{"role": "user", "content": "red"}], "completion": [call]}]
        assert findings_of(healthy(dataset=rows))["data"].status == "pass"

    @pytest.mark.parametrize(
        ("changes", "check", "says"),
        [
            (given(dataset=[{"prompt": text} for text in PROMPTS]), "data", "prompts only; a model writes"),
            (given(generation_kwargs={"stop_strings": ["cat"]}), "sampling", "4 samples"),
            (lambda c: c["teacher"].resize_token_embeddings(64), "vocabulary", "compared on the 40 real ids"),
            (mixed_types, "data", "8 rows of conversations"),  # Arrow keeps the contents as JSON only
            (given(processing_class=tiny_tokenizer(pad_is_eos=False)), "special_tokens", r"pad '<pad>' \(5\)"),
            (lambda c: c["teacher"].bfloat16(), "padding_soft_prompt", "padded rows are as alone"),
            (collator(lambda batch: None), "trained_tokens", "in every row"),
            (tokenized, "quality", "answers cost"),
        ],
    )
    def test_what_is_right_passes(self, changes, check, says):
        arguments = healthy()
        changes(arguments)
        assert re.search(says, self.assert_all_pass(arguments)[check].found)

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_priming(self, family):
        arguments = healthy(family, priming="teacher")
        arguments["dataset"] = answered_rows(arguments["teacher"], arguments["processing_class"], True, "teacher")
        findings = self.assert_all_pass(arguments, "priming", "quality", "trained_tokens")
        assert findings["priming"].values["tokens"] > 10
        assert findings["quality"].values["nll_primed_teacher"] < findings["quality"].values["nll_student"]
        assert "soft_prompt_gradient" not in findings

    @pytest.mark.parametrize("peft", [False, True])
    def test_self_distillation(self, peft):
        student = pair()[0]
        if peft:
            student = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
        findings = self.assert_all_pass(healthy(model=student, teacher=None, lora=peft), "soft_prompt_gradient")
        assert "own teacher" in findings["tokenizers"].found
        assert "padding_teacher" not in findings
        assert abs(findings["quality"].values["reverse_kl"]) < 1e-6

    def test_a_four_bit_teacher(self, tmp_path):
        findings = findings_of(healthy(teacher=four_bit_teacher(tmp_path)))
        assert {findings[name].status for name in ("soft_prompt_gradient", "padding_soft_prompt")} == {"pass"}

    def test_the_models_are_left_as_they_were(self):
        arguments = healthy()
        arguments["model"].train()
        before = [weights(arguments[role]) for role in ("model", "teacher")]
        diagnosed(arguments)
        assert arguments["model"].training
        assert all(parameter.requires_grad for parameter in arguments["model"].parameters())
        assert all(parameter.grad is None for parameter in arguments["model"].parameters())
        after = [weights(arguments[role]) for role in ("model", "teacher")]
        assert [difference(*states) for states in zip(before, after, strict=True)] == [0.0, 0.0]


class TestMemory:
    def parts(self, **settings):
        return findings_of(healthy(**settings))["memory"].values

    def test_weights_gradients_and_moments(self):
        size = 4 * sum(parameter.numel() for parameter in pair()[0].parameters()) / 1e9
        parts = self.parts()
        assert parts["student"] == parts["teacher"] == pytest.approx(size, rel=0.01)  # rotary frequencies come on top
        assert parts["gradients"] == pytest.approx(size)
        assert parts["AdamW"] == pytest.approx(2 * size)

    def test_an_adapter_needs_less_and_its_own_teacher_no_second_copy(self):
        parts = self.parts(lora=True)
        # 16 x the widths of 2 layers (q, k, v, o, gate, up, down), in float32
        assert parts["gradients"] == pytest.approx(16 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80) * 4 / 1e9)
        assert parts["teacher"] > 0
        assert self.parts(lora=True, teacher=None)["teacher"] == 0

    def test_rollouts_grow_with_the_window_and_losses_with_the_micro_batch(self):
        one = self.parts()
        window, batch = self.parts(gradient_accumulation_steps=3), self.parts(per_device_train_batch_size=24)
        assert window["rollouts"] == pytest.approx(3 * one["rollouts"])
        assert window["activations"] == one["activations"]
        assert batch["activations"] == pytest.approx(3 * one["activations"])
        assert self.parts(loss_chunk_size=64)["logits"] == pytest.approx(self.parts(loss_chunk_size=32)["logits"] * 2)

    def test_recomputed_activations_of_the_teacher_are_not_kept(self):
        kept, recomputed = self.parts(), self.parts(teacher_gradient_checkpointing=True)
        tokens = 8 * (max(len(prompt.split()) for prompt in PROMPTS) + 16 + 7)
        features = 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
        # Instead of what goes into and comes out of 2 layers: the inputs of both, and one layer
        spared = tokens * 4 * (features - 2 * 32 - features / 2) / 1e9
        assert kept["activations"] - recomputed["activations"] == pytest.approx(spared)

    def test_the_cache_is_that_of_keys_and_values(self):
        # 2 x layers x key-value heads x head size x (prompt + new) x rows x bytes, and drawing's logits
        longest = max(len(prompt.split()) for prompt in PROMPTS) + 16
        assert self.parts()["rollouts"] == pytest.approx((2 * 2 * 2 * 8 * longest * 8 * 4 + 28 * 40 * 8) / 1e9)

    def test_the_total_is_held_against_what_there_is(self, monkeypatch):
        total = self.parts()["total"]
        monkeypatch.setattr(memory_module, "available_memory", lambda device: total + 0.01)
        assert findings_of(healthy())["memory"].status == "pass"
        monkeypatch.setattr(memory_module, "available_memory", lambda device: total - 0.01)
        assert findings_of(healthy())["memory"].status == "warn"


@pytest.fixture
def folder(tmp_path):
    student, teacher = pair()
    save_models(tmp_path, student=student, teacher=teacher)
    rows = answered_rows(teacher, tiny_tokenizer())
    save_rows(tmp_path / "rows.jsonl", [{"question": row["prompt"], "answer": row["completion"]} for row in rows])
    return tmp_path


def flags(folder, *more):
    return [
        *("doctor", "--model", str(folder / "student"), "--teacher", str(folder / "teacher")),
        *("--dataset", str(folder / "rows.jsonl"), "--prompt_column", "question", "--completion_column", "answer"),
        *more,
    ]


def checks(out):
    return {check["name"]: check for check in json.loads(out)["checks"]}


class TestCommand:
    def test_a_table_and_exit_code_0(self, folder, capsys):
        assert main(flags(folder, "--lmbda", "0.5")) == 0
        out = capsys.readouterr().out
        for name in ("tokenizers", "soft_prompt_gradient", "memory"):
            assert re.search(rf"{name} +pass ", out), out
        assert "18 pass" in out

    def test_json_and_nothing_else_on_standard_output(self, folder, capsys):
        more = ("--max_new_tokens", "40", "--num_virtual_tokens", "3", "--gradient_accumulation_steps", "2")
        assert main(flags(folder, "--json", "--rows", "5", *more)) == 0
        captured = capsys.readouterr()
        report, found = json.loads(captured.out), checks(captured.out)
        assert report["passed"] is True
        assert report["teacher"] == str(folder / "teacher")
        assert [set(check) for check in report["checks"]] == [{"name", "status", "found", "advice", "values"}] * 18
        assert "5 rows of texts" in found["data"]["found"]
        assert found["positions"]["values"] == {"student": 45, "teacher": 48}
        assert "window of 16 rows" in found["memory"]["found"]
        assert "Loading" in captured.err

    def test_a_failed_check_is_exit_code_1_and_a_warning_0(self, folder, capsys):
        tiny_tokenizer([*WORDS[:-1], "five"]).save_pretrained(folder / "teacher")
        assert main(flags(folder, "--json")) == 1
        out = capsys.readouterr().out
        assert '"passed": false' in out
        assert checks(out)["tokenizers"]["status"] == "fail"
        for path in (folder / "teacher").glob("*token*"):
            path.unlink()
        assert main(flags(folder)) == 0
        assert re.search(r"tokenizers +warn ", capsys.readouterr().out)

    def test_priming_from_a_file_and_self_distillation(self, folder, capsys):
        (folder / "priming.txt").write_text("the answer is {{ reference_answer }} ")
        arguments = flags(folder, "--json", "--priming_file", str(folder / "priming.txt"), "--num_virtual_tokens", "3")
        del arguments[3:5]  # no teacher
        main(arguments)
        found = checks(capsys.readouterr().out)
        assert found["priming"]["status"] == "pass"
        assert "own teacher" in found["tokenizers"]["found"]

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--dataset", "nowhere.jsonl"], "no such file"),
            (["--dataset", "rows.csv"], "cannot be read"),
            (["--prompt_column", "text"], "'text'; the columns are"),
            (["--priming", "teacher", "--priming_file", "x"], "both given"),
            (["--rows", "0"], "`rows` is 0"),
            (["--num_virtual_tokens", "0"], "`num_virtual_tokens` is 0"),
            (["--model", "nowhere/at/all"], "nowhere/at/all"),
            (["--model_init_kwargs", "{"], "`model_init_kwargs` is the text '{'"),
            (["--priming", "teacher", "--lmbda", "0.5"], "'--lmbda', '0.5'"),
            (["--lmbda", "2"], "`lmbda` is 2"),
        ],
    )
    def test_unusable_arguments_are_exit_code_2(self, folder, capsys, monkeypatch, more, message):
        monkeypatch.chdir(folder)
        (folder / "rows.csv").write_bytes(b"\xff\xfe\x00" * 99)
        assert main(flags(folder, *more)) == 2
        captured = capsys.readouterr()
        assert message in captured.err.splitlines()[-1]
        assert captured.out == ""

    @pytest.mark.parametrize(
        ("recipe", "check", "says"),
        [
            ({"lmbda": 0.5, "max_length": 4}, "lengths", "do not fit into `max_length=4`"),
            ({"lmbda": 0.5, "num_virtual_tokens": 3, "max_new_tokens": 40}, "positions", "and the soft prompt 3"),
            ({"response_source": "student", "max_new_tokens": 40}, "positions", "samples 40 and the soft prompt 0"),
            ({"priming_text": "red "}, "priming", "reaches the teacher"),
            ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, "memory", "a window of 15 rows"),
        ],
    )
    def test_a_recipe_says_what_is_looked_at(self, folder, capsys, recipe, check, says):
        about = {
            "model": str(folder / "student"),
            "teacher_model_name_or_path": str(folder / "teacher"),
            "dataset": str(folder / "rows.jsonl"),
            "prompt_column": "question",
            "completion_column": "answer",
            "learning_rate": "1e-4",
            "eval_dataset": None,  # of the training alone
        }
        (folder / "recipe.yaml").write_text(json.dumps({**about, **recipe}))
        main(["doctor", "--config", str(folder / "recipe.yaml"), "--json"])
        out = capsys.readouterr().out
        assert json.loads(out)["dataset"] == str(folder / "rows.jsonl")
        assert says in checks(out)[check]["found"]

    def test_flags_win_over_the_recipe(self, folder, capsys):
        (folder / "recipe.yaml").write_text("{lmbda: 0.5, max_length: 4, model_name_or_path: nowhere}")
        assert main(flags(folder, "--config", str(folder / "recipe.yaml"), "--max_length", "64")) == 0

    @pytest.mark.parametrize("path", sorted((ROOT / "examples/configs").glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_recipe_is_understood_or_refused_with_a_remedy(self, path):
        given = parse_args(["doctor", "--config", str(path), "--use_cpu"])
        known = yaml.safe_load(path.read_text())
        if known.get("instruction_template") or "teacher_cache" in known:
            with pytest.raises(ValueError, match=r"Pass .* by `--(dataset|teacher)`"):
                parse(given)
        else:
            assert isinstance(parse(given)[-1], PrimedDistillConfig) == path.stem.startswith("primed_")
