"""Arguments of trainers, templates, callbacks, metrics and `evaluate_model`."""

from functools import partial

from case import Case, by_api, call, primed, promptkd, without
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from tiny import answered_dataset, chat_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from trl import SFTConfig

from trl_promptkd import (
    DataCollatorForPrimedDistillation,
    GenerationMetricsCallback,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptKDTrainer,
    SoftPrompt,
)
from trl_promptkd.evaluation import evaluate_model, rank_priming
from trl_promptkd.metrics import extract_final_number, gsm8k_accuracy, instruction_scores, load


BEST_MODEL = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def evaluate(rows=None, tokenizer=None, **settings):
    """`evaluate_model` without a model, as it is not reached."""
    dataset = chat_dataset() if rows is None else Dataset.from_list(rows)
    evaluate_model(None, tokenizer or tiny_tokenizer(), {"rows": dataset}, **settings)


def callback(trainer=None, **settings):
    trainer = trainer or promptkd(model=tiny_model(), teacher_model=tiny_model())
    GenerationMetricsCallback(trainer, chat_dataset(), **settings)


TRAINERS = [
    Case(
        "`load_best_model_at_end=True` with several evaluation sets",
        partial(promptkd, args=BEST_MODEL, eval_dataset={"a": prompt_dataset(2), "b": prompt_dataset(2)}),
        "`metric_for_best_model` is 'eval_forward_kl', but `eval_dataset` is a dict | 'eval_a_forward_kl'",
    ),
    Case(
        "an `EarlyStoppingCallback`, and no `metric_for_best_model`",
        partial(promptkd, callbacks=[EarlyStoppingCallback()]),
        "EarlyStoppingCallback, but `metric_for_best_model` is None | Set it to the metric to stop by",
    ),
    call(
        PrimedDistillTrainer,
        "two names of one setting | Leave 'torch_dtype' out",
        args={"model_init_kwargs": {"dtype": "float32", "torch_dtype": "bfloat16"}},
    ),
    call(
        PrimedDistillTrainer,
        "'load_in_4bit' | Write `model_init_kwargs={'quantization_config'",
        args={"model_init_kwargs": {"load_in_4bit": True}},
    ),
    Case(
        "`args=SFTConfig(...)`",
        lambda: PromptKDTrainer("a", "b", SFTConfig("run", bf16=False, use_cpu=True)),
        "`args` is a SFTConfig | `trl_promptkd.PromptKDConfig`",
        TypeError,
    ),
    call(
        PromptKDTrainer,
        "`train_dataset` is a NoneType | `load_dataset(name, split=...)`",
        TypeError,
        train_dataset=None,
    ),
    Case(
        "`PromptKDTrainer(tokenizer=...)`",
        partial(promptkd, tokenizer=None),
        "`tokenizer` is no argument | Pass it as `processing_class`",
        TypeError,
    ),
    Case(
        "`PrimedDistillTrainer(tokenizer=...)`",
        partial(primed, tokenizer=None),
        "`tokenizer` is no argument | Pass it as `processing_class`",
        TypeError,
    ),
    Case(
        "`formatting_func=...`",
        partial(promptkd, formatting_func=str),
        "`formatting_func` is not supported | Build `prompt` and `completion` columns",
    ),
    Case(
        "`compute_loss_func=...`",
        partial(primed, compute_loss_func=str),
        "`compute_loss_func` is not supported | Subclass PrimedDistillTrainer",
    ),
    call(
        PromptKDTrainer,
        "is a dict | Pass a `trl_promptkd.PromptEncoderConfig`",
        TypeError,
        prompt_encoder_config={"num_virtual_tokens": 3},
    ),
    Case(
        "`prompt_encoder_config=LoraConfig()`",
        partial(promptkd, prompt_encoder_config=LoraConfig()),
        "is a LoraConfig | Pass a `trl_promptkd.PromptEncoderConfig`",
        TypeError,
    ),
    Case(
        "`prompt_encoder_config=PromptTuningConfig(token_dim=77, ...)`",
        lambda: SoftPrompt(PromptTuningConfig(num_virtual_tokens=3, token_dim=77), tiny_model(), tiny_tokenizer()),
        "`token_dim` of `prompt_encoder_config` is 77 | have 32 | Leave it at None",
        needs_weights=True,
    ),
    call(PromptKDTrainer, "`peft_config` is a dict | such as `peft.LoraConfig()`", TypeError, peft_config={"r": 8}),
    Case(
        "`peft_config=LoraConfig(task_type='SEQ_CLS')`",
        partial(promptkd, peft_config=LoraConfig(task_type="SEQ_CLS")),
        "`task_type='SEQ_CLS'` | Set `task_type='CAUSAL_LM'`",
    ),
    Case(
        "`peft_config=PromptTuningConfig(...)`",
        partial(promptkd, peft_config=PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        "PromptTuningConfig | Use LoRA",
    ),
    Case(
        "a loaded teacher, and `teacher_model_init_kwargs`",
        lambda: promptkd(teacher_model=tiny_model(), args={"teacher_model_init_kwargs": {"dtype": "float32"}}),
        "`teacher_model` is not loaded by the trainer | Pass the teacher's name, or",
    ),
    call(
        PromptKDTrainer,
        "`teacher_model_init_kwargs['dtype']` is 'bf16' | the name of a torch dtype",
        args={"teacher_model_init_kwargs": {"dtype": "bf16"}},
    ),
    call(
        PrimedDistillTrainer,
        "'load_in_3bit', which bitsandbytes does not know | Set 'load_in_4bit' or 'load_in_8bit'",
        args={"teacher_model_init_kwargs": {"quantization_config": {"load_in_3bit": True}}},
    ),
    call(
        PromptKDTrainer,
        "`processing_class` is a str | Pass `AutoTokenizer.from_pretrained(name)`",
        TypeError,
        processing_class="gpt2",
    ),
    Case(
        "a student without a tokenizer beside it",
        partial(promptkd, processing_class=None),
        "'no/such-student' | Check the name, or pass the tokenizer",
        OSError,
    ),
    call(PromptKDTrainer, "`eos_token` is '<end>' | Name one of its tokens", args={"eos_token": "<end>"}),
    call(PromptKDTrainer, "`torch_compile` is True | Set it to False", args={"torch_compile": True}),
    Case(
        "`trainer.hyperparameter_search()`",
        lambda: promptkd(model=tiny_model(), teacher_model=tiny_model(seed=2)).hyperparameter_search(),
        "`hyperparameter_search` is not supported | `examples/search.py`",
        NotImplementedError,
        needs_weights=True,
    ),
    call(PromptKDTrainer, "`data_collator` is a str | callable with a list of rows", TypeError, data_collator="x"),
    call(PromptKDTrainer, "`callbacks` holds 'x' | `transformers.TrainerCallback`s", TypeError, callbacks=["x"]),
    Case(
        "a 4-bit student (`model_init_kwargs`) without `peft_config`",
        partial(promptkd, args={"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}),
        "quantized weights cannot be trained | Pass a `peft_config`",
    ),
    call(PrimedDistillTrainer, "`priming` is 'techer' | 'teacher', 'ground_truth'", priming="techer"),
    call(PrimedDistillTrainer, "are both set | pass one of them", teacher_model="x", teacher_cache="y"),
    call(
        PrimedDistillTrainer,
        "nothing of the student's samples | Pass a live `teacher_model`",
        teacher_model=None,
        teacher_cache="x",
        args={"response_source": "student"},
    ),
    Case(
        "`teacher_answers_url` and a `teacher_model`",
        partial(by_api, teacher_model="no/such-teacher"),
        "`teacher_model` and `teacher_answers_url` are both set | Omit `teacher_model`",
    ),
    Case(
        "`teacher_answers_url` and a `teacher_cache`",
        partial(by_api, teacher_cache="cache"),
        "`teacher_cache` and `teacher_answers_url` are both set | Omit `teacher_cache`",
    ),
    call(
        PrimedDistillTrainer,
        "`teacher_model` is None | Pass the name or the folder",
        teacher_model=None,
        teacher_server="http://host:8000",
    ),
    call(
        PrimedDistillTrainer,
        "are both set | pass one of them",
        teacher_model=None,
        teacher_cache="x",
        teacher_server="http://host:8000",
    ),
    call(
        PrimedDistillTrainer,
        "a server in pooling mode writes no answers | Set `response_source` to 'dataset' or 'student'",
        teacher_server="http://host:8000",
        args={"response_source": "teacher"},
    ),
    call(
        PrimedDistillTrainer,
        "holds 'device_map', which has no effect | Remove it",
        teacher_server="http://host:8000",
        args={"teacher_model_init_kwargs": {"device_map": "auto"}},
    ),
]
OTHERS = [
    call(PrimingTemplate, "which says nothing | set `priming=None`", text=""),
    call(PrimingTemplate, "`placement` is 'middle' | 'prefix', 'suffix', 'system'", text="x", placement="middle"),
    call(PrimingTemplate, "is not a valid Jinja template | Text that contains '{{'", text="{{ topic"),
    call(
        DataCollatorForPrimedDistillation,
        "`processing_class` is a str | a tokenizer",
        TypeError,
        processing_class="gpt2",
    ),
    Case(
        "`DataCollatorForPrimedDistillation` with a tokenizer without pad token",
        lambda: DataCollatorForPrimedDistillation(without("pad_token")),
        "no pad token | Set `tokenizer.pad_token = tokenizer.eos_token`",
    ),
    Case(
        "`GenerationMetricsCallback(..., task='mmlu')`",
        partial(callback, task="mmlu"),
        "`task` is 'mmlu' | 'instruct' or 'gsm8k'",
    ),
    Case(
        "`GenerationMetricsCallback` without a trainer",
        lambda: callback(chat_dataset()),
        "`trainer` is a Dataset | Make it first",
        TypeError,
    ),
    Case(
        "`GenerationMetricsCallback` of a trainer without `processing_class`",
        lambda: callback(Trainer(tiny_model(), TrainingArguments("run", use_cpu=True, report_to="none"))),
        "`processing_class` is none | Make the trainer with",
    ),
    call(load, "metric is 'rouge' | 'gsm8k' or 'instruction_scores'", name="rouge"),
    call(extract_final_number, "`rule` is 'last' | 'strict' or 'flexible' or 'paper'", text="18", rule="last"),
    call(
        instruction_scores,
        "`references[0]` is 'the cat', a str | a list of texts",
        TypeError,
        predictions=["the cat"],
        references=["the cat"],
    ),
    call(gsm8k_accuracy, "1 `predictions` and 2 `references`", predictions=["18"], references=[18, 3]),
    Case("`evaluate_model(seeds=[10, 10])`", partial(evaluate, seeds=[10, 10]), "`seeds` are [10, 10] | different"),
    Case(
        "`evaluate_model(temperature=0.7)` without seeds",
        partial(evaluate, temperature=0.7),
        "`temperature` is 0.7, but answers are greedy | Give seeds",
    ),
    Case(
        "`rank_priming(scorer='bleu')`",
        lambda: rank_priming(None, tiny_tokenizer(), answered_dataset(2), scorer="bleu"),
        "`scorer` is 'bleu'; it must be 'gsm8k', 'exact_match', 'rougeL' or a function",
    ),
    Case(
        "`rank_priming(texts=[])`",
        lambda: rank_priming(None, tiny_tokenizer(), answered_dataset(2), texts=[]),
        "`texts` are empty | None for all built-in ones",
    ),
    Case(
        "`evaluate_model(template='chat')`, and a tokenizer without a chat template",
        partial(evaluate, template="chat", tokenizer=without("chat_template")),
        "the tokenizer has no chat template | Choose 'paper' or 'plain'",
    ),
]
CASES = TRAINERS + OTHERS
