"""Everything private or experimental that this package relies on: an upgrade that changes it fails here first."""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import get_type_hints

import accelerate
import pytest
import transformers
import transformers.integrations.deepspeed
import trl
import trl.generation.vllm_generation
from tiny import answered_dataset, tiny_model
from trainers import BEST, PROMPT_TEXT, equal, lora, trained
from transformers import GenerationMixin, Trainer
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

import trl_promptkd
from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, PromptKDConfig, PromptKDTrainer, _trl


PACKAGE = Path(trl_promptkd.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def parameters(function):
    return list(inspect.signature(function).parameters)


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


class TestWhatWeRelyOn:
    def test_names_of_the_compatibility_module(self):
        assert all(hasattr(_trl, name) for name in _trl.__all__)

    def test_base_classes(self):
        assert issubclass(PromptKDTrainer, _trl.GKDTrainer)
        assert issubclass(PromptKDConfig, _trl.GKDConfig)
        assert _trl.GKDTrainer.__mro__[1] is SFTTrainer

    def test_gkds_arguments_are_ours_in_the_same_order(self):
        gkd = parameters(_trl.GKDTrainer.__init__)
        assert parameters(PromptKDTrainer.__init__)[: len(gkd)] == gkd

    def test_gkds_own_init_sets_nothing_that_we_leave_out(self):
        """We call SFTTrainer.__init__ past it; whatever it sets on itself, our __init__ must set too."""

        def attributes(cls):
            nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls.__init__))))
            stored = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
            return {node.attr for node in stored if ast.unparse(node.value) == "self"}

        assert attributes(_trl.GKDTrainer) <= attributes(PromptKDTrainer)

    def test_hooks_of_the_trainer_that_we_override(self):
        """The public ones; see `PRIVATE_OVERRIDES`."""
        expected = {
            "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
            "create_scheduler": ["self", "num_training_steps", "optimizer"],
            "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
            "save_model": ["self", "output_dir", "_internal_call"],
        }
        for name, names in expected.items():
            assert parameters(getattr(Trainer, name)) == names
        # `private` is newer than the oldest transformers; we hand on whatever is given
        assert parameters(Trainer.init_hf_repo) in (["self", "token"], ["self", "token", "private"])
        assert SFTTrainer.loss_is_scaled_for_ga is None  # TRL reads it for transformers that do not

    def test_the_fused_forward_is_an_instance_attribute(self):
        """Self-distillation drops it from its copy of the student."""
        assert "model.forward = " in inspect.getsource(trl.trainer.utils.add_fused_lm_head)

    def test_what_is_not_given_is_taken_out_at_any_depth_and_lists_keep_their_places(self):
        row = {"a": None, "b": [{"c": None, "d": [1, None]}], "e": {"f": None}}
        assert _trl.remove_none_values(row) == {"b": [{"d": [1, None]}], "e": {}}

    def test_what_shards_the_teacher(self):
        assert parameters(_trl.fsdp2_prepare_model) == ["accelerator", "model"]
        assert parameters(_trl.prepare_deepspeed) == ["model", "accelerator"]

    def test_what_renames_an_older_checkpoints_weights(self):
        keys = ["embed_out.weight", "gpt_neox.embed_in.weight"]
        names = _trl.names_in_model(tiny_model("gpt_neox", tie_word_embeddings=False), keys)
        assert names == {"lm_head.weight": keys[0], "gpt_neox.embed_in.weight": keys[1]}

    def test_old_checkpoints_go_at_the_end_of_saving(self):
        """`save_total_limit` is lifted around it; what it does with the limit is then done by us."""
        assert "rotate_checkpoints(" in inspect.getsource(Trainer._save_checkpoint)
        names = {"output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"}
        assert names <= set(parameters(rotate_checkpoints))

    def test_a_loop_of_ones_own_does_not_get_synced_gpus(self):
        """Which is why it is bound to it; once it is handed on, binding it twice would be an error."""
        source = inspect.getsource(GenerationMixin._extract_generation_mode_kwargs)
        assert "generation_mode_kwargs = {k: kwargs.pop(k) for k in new_custom_keys if k in kwargs}" in source


class TestWithoutGKD:
    """TRL's `GKDTrainer` is experimental, and may go. Then PromptKD extends `SFTTrainer`."""

    def test_all_of_its_fields_are_promptkds_own(self):
        theirs, ours = _trl.GKDConfig.__dataclass_fields__, PromptKDConfig.__dataclass_fields__
        names = _trl.GKDConfig.__annotations__.keys()
        assert names <= PromptKDConfig.__annotations__.keys()
        types = [
            get_type_hints(config_class) for config_class in (_trl.GKDConfig, PromptKDConfig)
        ]  # parsers change fields
        assert all(types[0][name] == types[1][name] for name in names)
        other = {name for name in names if ours[name].default != theirs[name].default}
        assert other == {"lmbda", "beta", "temperature"}  # the paper's
        assert set(PromptKDConfig._VALID_DICT_FIELDS) == {*_trl.GKDConfig._VALID_DICT_FIELDS, "generation_kwargs"}

    def test_training_gives_the_same_weights(self, promptkd, monkeypatch):
        settings = {"lmbda": 0.5, "seq_kd": True, "max_steps": 2, "gradient_accumulation_steps": 2}
        with_gkd = trained(promptkd(**settings))

        ours = [name for name in sys.modules if name.split(".")[0] == "trl_promptkd"]
        for name in ours:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "trl.experimental.gkd", None)
        anew = importlib.import_module("trl_promptkd")
        promptkd.trainer_class, promptkd.config_class = anew.PromptKDTrainer, anew.PromptKDConfig
        trainer = promptkd(**settings, prompt_encoder_config=anew.PromptEncoderConfig(prompt_init_text=PROMPT_TEXT))
        assert type(trainer).__mro__[1] is SFTTrainer
        assert type(trainer.args).__mro__[2] is SFTConfig
        assert equal(trained(trainer), with_gkd)


@pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")
def test_nothing_is_used_that_is_announced_to_go(make):
    """TRL 2 and transformers 6 are announced by warnings."""
    samples = {} if make.method == "promptkd" else {"response_source": "student"}
    trainer = make(
        **BEST,
        **samples,
        eval_dataset=answered_dataset(4),
        peft_config=lora(),
        compute_metrics=lambda prediction: {"rows": len(prediction.predictions)},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.predict(answered_dataset(3)).metrics["test_rows"] == 3
    trainer.save_model()


# Private attributes of other packages' objects: where they are, and what they are for
PRIVATE_ATTRIBUTES = {
    "_attn_implementation": (transformers.configuration_utils, "switches attention weights on"),
    "_commit_hash": (transformers.configuration_utils, "the revision in a cache's manifest"),
    "_get_output_dir": (transformers.Trainer, "where a checkpoint goes"),
    "_hf_deepspeed_config_weak_ref": (transformers.integrations.deepspeed, "whether new models are sharded"),
    "_gradient_checkpointing_func": (transformers.modeling_layers, "recomputes the teacher's layers"),
    "_is_accelerate_prepared": (accelerate.accelerator, "lets a model be prepared again"),
    "_iter_named_params": (trl.generation.vllm_generation, "the weights that are pushed to vLLM"),
    "_metrics": (SFTTrainer, "where SFTTrainer keeps `num_tokens`"),
    "_name_or_path": (transformers.configuration_utils, "a model's name"),
    "_prepare_inputs": (transformers.Trainer, "moves a batch to the device"),
    "_sample": (GenerationMixin, "the loop of sampling"),
    "_total_train_tokens": (SFTTrainer, "SFTTrainer's count of tokens"),
}
# What our classes replace of their base classes' private parts: parameters, or `None` where it is no method
OF_BOTH_TRAINERS = {
    "_load_best_model": ["self"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_name": None,
    "_paper": None,
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_tag_names": None,
}
PRIVATE_OVERRIDES = {
    PromptKDTrainer: {
        **OF_BOTH_TRAINERS,
        "_load_optimizer_and_scheduler": ["self", "checkpoint"],
        "_save_optimizer_and_scheduler": ["self", "output_dir"],
    },
    PrimedDistillTrainer: {**OF_BOTH_TRAINERS, "_set_signature_columns_if_needed": ["self"]},
    PromptKDConfig: {"_VALID_DICT_FIELDS": None},
    PrimedDistillConfig: {"_VALID_DICT_FIELDS": None},
}


class TestWhatIsPrivate:
    @pytest.mark.parametrize("name", sorted(PRIVATE_ATTRIBUTES))
    def test_attributes_are_there(self, name):
        assert re.search(rf"\b{name}\b", inspect.getsource(PRIVATE_ATTRIBUTES[name][0]))

    def test_no_other_attributes_are_used(self):
        nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        # `getattr(model, "_name")`, `model.__dict__.pop("_name")`
        arguments = [argument for node in nodes if isinstance(node, ast.Call) for argument in node.args[:2]]
        texts = {x.value for x in arguments if isinstance(x, ast.Constant) and isinstance(x.value, str)}
        used = {
            name for name in {node.attr for node in attributes} | texts if is_private(name) and name.isidentifier()
        }
        assert used - own - {"_runtime", "_init_kwargs", "_fields", "_replace"} <= set(PRIVATE_ATTRIBUTES)

    @pytest.mark.parametrize("cls", PRIVATE_OVERRIDES)
    def test_what_is_overridden_is_listed_and_as_it_was(self, cls):
        bases = [base for base in cls.__mro__[1:] if not base.__module__.startswith("trl_promptkd")]
        found = {}
        for ours in [c for c in cls.__mro__ if c.__module__.startswith("trl_promptkd")]:
            for name in filter(is_private, vars(ours)):
                theirs = next((vars(base)[name] for base in bases if name in vars(base)), None)
                if theirs is not None:
                    found[name] = parameters(theirs) if inspect.isfunction(theirs) else None
                    if found[name]:
                        assert parameters(vars(ours)[name]) == found[name]
        assert found == PRIVATE_OVERRIDES[cls]


class TestImports:
    def test_only_one_module_imports_what_is_private(self):
        private = ("trl.", "peft.tuners", "peft.utils", "bitsandbytes.", "accelerate.utils.")
        for file in SOURCES.keys() - {"_trl.py"}:
            for node in ast.walk(TREES[file]):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert not any(is_private(alias.name) for alias in node.names), f"{file}: {ast.unparse(node)}"
                for name in names:
                    parts = name.split(".") if name != "_trl" else []
                    assert not name.startswith(private), f"{file} imports {name}"
                    assert not any(map(is_private, parts)), f"{file} imports {name}"

    def test_tensor_code_imports_neither_trl_nor_trainers(self):
        assert all("_trl" not in SOURCES[file] for file in SOURCES if file.startswith(("divergences.py", "losses/")))

    @pytest.mark.parametrize("word", ["pickle", "torch.load", "torch.save"])
    def test_no_pickle(self, word):
        assert [file for file, source in SOURCES.items() if word in source] == []
