import pytest

from trl_promptkd import PrimedDistillConfig


class TestDefaults:
    def test_are_the_papers(self, tmp_path):
        args = PrimedDistillConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
        assert args.alpha == 0.6093348343631224
        assert args.kd_temperature == 5.942267335064758
        assert (args.kd_beta, args.skew, args.response_source, args.overlong) == (1.0, 0.0, "dataset", "drop")
        assert args.teacher_max_length is None

    def test_student_samples_have_no_hard_labels(self, make_primed_args):
        assert make_primed_args(response_source="student").alpha == 0.0
        assert make_primed_args(response_source="teacher", alpha=0.2).alpha == 0.2

    def test_dicts_may_come_as_json(self, make_primed_args):
        args = make_primed_args(
            generation_kwargs='{"do_sample": false}', teacher_model_init_kwargs='{"dtype": "bfloat16"}'
        )
        assert args.generation_kwargs == {"do_sample": False}
        assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 1.5}, "`alpha` is 1.5; it must be between 0 and 1"),
            ({"kd_beta": -0.1}, "`kd_beta` is -0.1"),
            ({"kd_temperature": 0.0}, "`kd_temperature` is 0.0; it must be above 0"),
            ({"skew": 1.0}, "`skew` is 1.0; it must be at least 0 and below 1"),
            ({"skew": 0.1, "kd_beta": 0.5}, "only the forward and the reverse KL"),
            (
                {"response_source": "gold"},
                "`response_source` is 'gold'; it must be 'dataset' or 'teacher' or 'student'",
            ),
            ({"overlong": "cut"}, "`overlong` is 'cut'; it must be 'drop' or 'error'"),
            ({"response_source": "student", "alpha": 0.5}, "own samples are no hard labels"),
            ({"teacher_max_length": 0}, "`teacher_max_length` is 0"),
            ({"loss_chunk_size": -1}, "`loss_chunk_size` is -1"),
            ({"temperature": 0.0}, "`temperature` is 0.0.*do_sample"),
            ({"top_p": 0.0}, "`top_p` is 0.0"),
            ({"top_k": -1}, "`top_k` is -1"),
            ({"packing": True}, "`packing=True` has no meaning in primed distillation: rows are compared one by one"),
            ({"padding_free": True}, "`padding_free=True` has no meaning"),
            ({"assistant_only_loss": True}, "`assistant_only_loss=True` has no meaning"),
            ({"loss_type": "dft"}, "`loss_type='dft'` has no meaning"),
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1` has no meaning"),
            ({"router_aux_loss_coef": 0.1}, "`router_aux_loss_coef=0.1` has no meaning"),
            ({"completion_only_loss": False}, "`completion_only_loss=False` has no meaning"),
        ],
    )
    def test_name_the_field_and_what_is_allowed(self, make_primed_args, settings, message):
        with pytest.raises(ValueError, match=message):
            make_primed_args(**settings)
