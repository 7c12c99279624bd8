"""Both trainers' settings. More that is refused is in test_bad_inputs.py."""

import dataclasses
import json
import re

import pytest
import yaml
from trainers import Maker
from transformers import TrainingArguments, training_args
from trl import TrlParser

from trl_promptkd import PrimedDistillConfig, PromptKDConfig
from trl_promptkd.trainer import precision


def test_promptkds_defaults_are_the_papers(promptkd):
    args = promptkd.args()
    assert (args.lmbda, args.beta, args.temperature, args.loss_temperature) == (1.0, 1.0, 1.0, 1.0)
    assert (args.prompt_divergence, args.prompt_update, args.prompt_share) == ("reverse", "sequential", 1.0)
    assert (args.regularization_coef, args.regularization_schedule) == (1.0, "linear")
    assert (args.top_k, args.top_p) == (0, 1.0)


def test_primings_defaults_are_the_papers(tmp_path):
    args = PrimedDistillConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert args.alpha == 0.6093348343631224
    assert args.kd_temperature == 5.942267335064758
    assert (args.kd_beta, args.skew, args.response_source, args.overlong) == (1.0, 0.0, "dataset", "drop")
    assert args.teacher_max_length is None


def test_student_samples_have_no_hard_labels(primed):
    assert primed.args(response_source="student").alpha == 0.0
    assert primed.args(response_source="teacher", alpha=0.2).alpha == 0.2


def test_columns_are_kept_and_rows_are_ours_to_prepare(make):
    args = make.args(dataset_kwargs={"x": 1})
    assert args.remove_unused_columns is False
    assert args.dataset_kwargs == {"x": 1, "skip_prepare_dataset": True}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {"x": 1}}])
def test_checkpointing_goes_by_the_name_that_all_versions_of_transformers_know(make, given):
    """Newer ones warn of it."""
    args = make.args(**given)
    assert args.gradient_checkpointing is given.get("gradient_checkpointing", True)
    assert args.gradient_checkpointing_kwargs == given.get("gradient_checkpointing_kwargs")
    again = dataclasses.replace(args, seed=1)
    assert again.gradient_checkpointing is args.gradient_checkpointing


@pytest.mark.skipif(not hasattr(TrainingArguments, "activation_checkpointing"), reason="an older transformers")
def test_checkpointings_new_name_wins(make):
    args = make.args(activation_checkpointing=False, activation_checkpointing_kwargs={"x": 1})
    assert args.gradient_checkpointing is args.activation_checkpointing is False
    assert args.gradient_checkpointing_kwargs == {"x": 1}


def test_dicts_may_come_as_json(make):
    args = make.args(generation_kwargs='{"do_sample": false}', teacher_model_init_kwargs='{"dtype": "bfloat16"}')
    assert args.generation_kwargs == {"do_sample": False}
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}


@pytest.mark.parametrize("value", ["a/teacher", {"math": "a/teacher", "own": None}])
def test_teachers_come_from_flags_and_yaml_by_name_too(tmp_path, value):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"teacher_model_name_or_path": value}))
    flag = value if isinstance(value, str) else json.dumps(value)
    for given in (["--teacher_model_name_or_path", flag], ["--config", str(tmp_path / "run.yaml")]):
        settings = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
        (args,) = TrlParser((PrimedDistillConfig,)).parse_args_and_config([*given, *settings])
        assert args.teacher_model_name_or_path == value


def test_every_new_field_has_help(make):
    own = [name for name in make.config_class.__annotations__ if not name.startswith("_")]
    assert all(make.config_class.__dataclass_fields__[name].metadata.get("help") for name in own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"rollout_batch_size": 0}, "`rollout_batch_size` is 0"),
        ({"loss_chunk_size": 0}, "`loss_chunk_size` is 0"),
        ({"temperature": 0.0}, "`temperature` is 0.0; it must be above 0.*do_sample"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"overlong": "cut"}, "`overlong` is 'cut'"),
        ({"packing": True}, "`packing=True` has no meaning in (PromptKD|primed distillation): rows are"),
        ({"padding_free": True}, "`padding_free=True` has no meaning"),
        ({"assistant_only_loss": True}, "`assistant_only_loss=True` has no meaning"),
        ({"completion_only_loss": False}, "`completion_only_loss=False` has no meaning"),
        ({"loss_type": "dft"}, "`loss_type='dft'` has no meaning"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1` has no meaning"),
        ({"activation_offloading": True}, "`activation_offloading=True` has no meaning"),
        ({"enable_jit_checkpoint": True}, r"`enable_jit_checkpoint=True` has no meaning.*save_on_interrupt=True"),
    ],
)
def test_bad_values_of_both_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make.args(**settings)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("promptkd", {"regularization_schedule": "cosine"}, "`regularization_schedule` is 'cosine'"),
        ("promptkd", {"loss_temperature": -1.0}, "`loss_temperature` is -1.0"),
        ("promptkd", {"beta": -0.5}, "beta"),
        ("promptkd", {"prompt_share": 1.01}, "`prompt_share` is 1.01; it must be above 0 and at most 1"),
        ("primed", {"kd_beta": -0.1}, "`kd_beta` is -0.1"),
        ("primed", {"kd_temperature": 0.0}, "`kd_temperature` is 0.0; it must be above 0"),
        ("primed", {"teacher_max_length": 0}, "`teacher_max_length` is 0"),
        ("primed", {"router_aux_loss_coef": 0.1}, "`router_aux_loss_coef=0.1` has no meaning"),
    ],
)
def test_bad_values_of_one_are_refused(tmp_path, method, settings, message):
    with pytest.raises(ValueError, match=message):
        Maker(method, tmp_path).args(**settings)


class TestPrecision:
    """What TRL's default of bfloat16 becomes on a CPU."""

    @pytest.mark.parametrize("config_class", [PromptKDConfig, PrimedDistillConfig])
    @pytest.mark.parametrize(
        ("gpu", "settings", "bf16", "message"),
        [
            (False, {}, False, "`bf16` is not set, and this run is on a CPU: it trains in float32"),
            (False, {"use_cpu": True}, False, "`bf16` is not set, and this run is on a CPU: it trains in float32"),
            (True, {"use_cpu": True}, False, "`bf16` is not set, and this run is on a CPU: it trains in float32"),
            (
                False,
                {"bf16": True},
                False,
                "`bf16` is True, but no GPU was found: .*float32. Set `use_cpu=True`",
            ),
            (False, {"bf16": True, "use_cpu": True}, True, None),
            (False, {"bf16": False}, False, None),
            (True, {}, True, None),
            (True, {"bf16": True}, True, None),
        ],
    )
    def test_a_cpu_trains_in_float32_and_says_so(
        self, config_class, gpu, settings, bf16, message, tmp_path, monkeypatch
    ):
        for module in (precision, training_args):
            monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: gpu)
        said = []
        monkeypatch.setattr(precision.logger, "warning_once", said.append)
        assert config_class(output_dir=str(tmp_path), **settings).bf16 is bf16
        assert len(said) == (message is not None)
        assert message is None or re.match(message, said[0])
