import pytest

from trl_promptkd import PromptKDConfig


class TestDefaults:
    def test_are_the_papers(self, make_args):
        args = make_args()
        assert (args.lmbda, args.beta, args.temperature, args.loss_temperature) == (1.0, 1.0, 1.0, 1.0)
        assert (args.prompt_divergence, args.prompt_update) == ("reverse", "sequential")
        assert (args.regularization_coef, args.regularization_schedule) == (1.0, "linear")
        assert (args.top_k, args.top_p) == (0, 1.0)

    def test_columns_are_kept_and_rows_are_ours_to_prepare(self, make_args):
        args = make_args(dataset_kwargs={"x": 1})
        assert args.remove_unused_columns is False
        assert args.dataset_kwargs == {"x": 1, "skip_prepare_dataset": True}

    def test_generation_kwargs_may_be_json(self, make_args):
        assert make_args(generation_kwargs='{"do_sample": false}').generation_kwargs == {"do_sample": False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_divergence": "jsd"}, "`prompt_divergence` is 'jsd'; it must be 'reverse' or 'forward'"),
        ({"regularization_schedule": "cosine"}, "`regularization_schedule` is 'cosine'"),
        ({"prompt_update": "alternating"}, "`prompt_update` is 'alternating'"),
        ({"overlong": "cut"}, "`overlong` is 'cut'; it must be 'error' or 'drop'"),
        ({"temperature": 0.0}, "`temperature` is 0.0; it must be above 0.*do_sample"),
        ({"loss_temperature": -1.0}, "`loss_temperature` is -1.0"),
        ({"rollout_batch_size": 0}, "`rollout_batch_size` is 0"),
        ({"loss_chunk_size": 0}, "`loss_chunk_size` is 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"regularization_coef": -0.1}, "`regularization_coef` is -0.1"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"lmbda": 1.5}, "lmbda"),
        ({"beta": -0.5}, "beta"),
        ({"packing": True}, "`packing=True` has no meaning in PromptKD"),
        ({"padding_free": True}, "`padding_free=True`"),
        ({"assistant_only_loss": True}, "`assistant_only_loss=True`"),
        ({"loss_type": "dft"}, "`loss_type='dft'`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor=0.1`"),
        ({"completion_only_loss": False}, "`completion_only_loss=False`"),
    ],
)
def test_bad_values_are_refused(make_args, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(**settings)


def test_every_new_field_has_help():
    own = [name for name in PromptKDConfig.__annotations__ if not name.startswith("_")]
    fields = PromptKDConfig.__dataclass_fields__
    assert all(fields[name].metadata.get("help") for name in own)
