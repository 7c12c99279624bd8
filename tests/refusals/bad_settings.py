"""Fields of the three configurations."""

from case import NAN, call

from trl_promptkd import PrimedDistillConfig, PromptEncoderConfig, PromptKDConfig


def wrong(config, allowed, error=ValueError, **setting):
    """One field, whose value is named with what is allowed."""
    ((name, value),) = setting.items()
    return call(config, f"`{name}` is {value!r} | {allowed}", error, **setting)


def by_api(says, **settings):
    """Settings that do not go with a teacher behind an API."""
    settings = {"teacher_answers_url": "http://localhost:8000/v1", "response_source": "teacher", **settings}
    return call(PrimedDistillConfig, says, **settings)


CASES = [
    wrong(PromptKDConfig, "between 0 and 1", lmbda=1.5),
    wrong(PromptKDConfig, "a number. Write it without quotes", TypeError, lmbda="1.0"),
    wrong(PromptKDConfig, "a number", TypeError, lmbda=None),
    wrong(PromptKDConfig, "finite, and between 0 and 1", beta=NAN),
    wrong(PromptKDConfig, "above 0. For greedy decoding", temperature=0.0),
    wrong(PromptKDConfig, "a number", TypeError, temperature="warm"),
    wrong(PromptKDConfig, "finite, and above 0", loss_temperature=NAN),
    wrong(PromptKDConfig, "at least 0", regularization_coef=-0.1),
    wrong(PromptKDConfig, "'reverse' or 'forward'", prompt_divergence="jsd"),
    wrong(PromptKDConfig, "'sequential' or 'simultaneous'", prompt_update=None),
    wrong(PromptKDConfig, "above 0 and at most 1", prompt_share=0.0),
    wrong(PromptKDConfig, "'error' or 'drop'", overlong="cut"),
    wrong(PromptKDConfig, "True or False", TypeError, seq_kd="no"),
    wrong(PromptKDConfig, "above 0 and at most 1", top_p=1.5),
    wrong(PromptKDConfig, "a whole number", TypeError, top_k=0.5),
    wrong(PromptKDConfig, "a whole number", TypeError, max_new_tokens="16"),
    wrong(PromptKDConfig, "above 0", max_new_tokens=0),
    wrong(PromptKDConfig, "a whole number or None", TypeError, rollout_batch_size=1.5),
    wrong(PromptKDConfig, "above 0", loss_chunk_size=-1),
    wrong(PromptKDConfig, "above 0", max_length=-5),
    wrong(PromptKDConfig, "finite, and at least 0", learning_rate=NAN),
    wrong(PromptKDConfig, "above 0", gradient_accumulation_steps=0),
    wrong(PromptKDConfig, "at least 0", seed=-1),
    wrong(PromptKDConfig, "'colocate' or 'server'", vllm_mode="remote"),
    wrong(PromptKDConfig, "above 0 and at most 1", vllm_gpu_memory_utilization=3.0),
    wrong(PromptKDConfig, "a dict or None", TypeError, teacher_model_init_kwargs=[1]),
    call(PromptKDConfig, "`packing=True` | False", packing=True),
    call(PromptKDConfig, "`completion_only_loss=False` | only completions", completion_only_loss=False),
    call(PromptKDConfig, "'do_smaple' | Did you mean 'do_sample'?", generation_kwargs={"do_smaple": False}),
    call(PromptKDConfig, "'max_new_tokens' | Set that", generation_kwargs={"max_new_tokens": 9}),
    call(PromptKDConfig, "'num_return_sequences' | one completion", generation_kwargs={"num_return_sequences": 2}),
    call(
        PromptKDConfig, "`generation_kwargs` | a dict, or one written as JSON", generation_kwargs="{do_sample: false}"
    ),
    wrong(PrimedDistillConfig, "between 0 and 1", alpha=1.5),
    call(PrimedDistillConfig, "`alpha` is 0.5 | Set `alpha=0`", alpha=0.5, response_source="student"),
    wrong(PrimedDistillConfig, "a number", TypeError, kd_beta="0"),
    wrong(PrimedDistillConfig, "finite, and above 0", kd_temperature=float("inf")),
    wrong(PrimedDistillConfig, "a number", TypeError, kd_temperature=None),
    wrong(PrimedDistillConfig, "at least 0 and below 1", skew=1.0),
    call(PrimedDistillConfig, "`skew` is 0.1 with `kd_beta=0.5` | Set `skew=0`", skew=0.1, kd_beta=0.5),
    wrong(PrimedDistillConfig, "'dataset' or 'teacher' or 'student'", response_source="gold"),
    wrong(PrimedDistillConfig, "a whole number or None", TypeError, teacher_max_length=2.5),
    wrong(PrimedDistillConfig, "a text or None", TypeError, teacher_model_name_or_path=3),
    call(PrimedDistillConfig, "a dict, or one written as JSON", teacher_model_name_or_path="{'math': 'a/teacher'}"),
    wrong(PrimedDistillConfig, "such as 'http://host:8000'", teacher_server="host:8000"),
    call(
        PrimedDistillConfig,
        "`teacher_server['math']` is 'host' | starts with http",
        teacher_server={"math": "host"},
    ),
    call(
        PrimedDistillConfig,
        "settings are saved and shown | VLLM_API_KEY",
        teacher_server="http://me:key@host",
    ),
    wrong(PrimedDistillConfig, "'bfloat16' or 'float32'", teacher_server_dtype="float16"),
    wrong(PrimedDistillConfig, "above 0", teacher_server_timeout=0),
    wrong(PrimedDistillConfig, "above 0", pad_to_multiple_of=-8),
    call(
        PrimedDistillConfig,
        "`teacher_answers_url` is 'localhost:8000' | starts with http:// or https://",
        teacher_answers_url="localhost:8000",
        response_source="teacher",
    ),
    call(
        PrimedDistillConfig,
        "A key goes into the environment variable OPENAI_API_KEY",
        teacher_answers_url="https://me:my-key@example.com/v1",
        response_source="teacher",
    ),
    by_api("`response_source` is 'dataset' | Set `response_source='teacher'`", response_source="dataset"),
    by_api("`alpha` is 0.5 | hard labels alone. Set `alpha=1`", alpha=0.5),
    by_api("`top_k` is 50 | Omit it", top_k=50),
    by_api("`generation_kwargs` holds 'stop_strings' | Omit it", generation_kwargs={"stop_strings": ["Q:"]}),
    by_api(
        "`metric_for_best_model` is 'kl/student_teacher' | Set it to 'eval_ce'",
        metric_for_best_model="kl/student_teacher",
    ),
    by_api("`teacher_max_length` is 512 | not known here. Omit it", teacher_max_length=512),
    call(
        PrimedDistillConfig,
        "`teacher_answers_model` is 'gpt-4o', but `teacher_answers_url` is None | the address of the API",
        teacher_answers_model="gpt-4o",
    ),
    wrong(PromptEncoderConfig, "at least 1", num_virtual_tokens=0),
    wrong(PromptEncoderConfig, "a whole number", TypeError, num_virtual_tokens="7"),
    wrong(PromptEncoderConfig, "'text' or 'random' or 'vocab'", prompt_init="zeros"),
    wrong(PromptEncoderConfig, "Give a text, or set `prompt_init`", prompt_init_text="  "),
    wrong(PromptEncoderConfig, "a text", TypeError, prompt_init_text=None),
    wrong(PromptEncoderConfig, "'embedding' or 'mlp' or 'lstm'", encoder="gru"),
    wrong(PromptEncoderConfig, "a number or None. Write it without quotes", TypeError, prompt_learning_rate="1e-3"),
    wrong(PromptEncoderConfig, "at least 0", prompt_max_grad_norm=-1.0),
]
