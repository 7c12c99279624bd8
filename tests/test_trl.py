"""Everything private or experimental that this package relies on: an upgrade that changes it fails here first."""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest
import torch
import trl
from packaging.version import Version
from transformers import GenerationMixin, Trainer
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

import trl_promptkd
from trl_promptkd import PromptKDConfig, PromptKDTrainer, _trl


PACKAGE = Path(trl_promptkd.__file__).parent


def parameters(function):
    return list(inspect.signature(function).parameters)


class TestWhatWeRelyOn:
    def test_names_of_the_compatibility_module(self):
        assert all(hasattr(_trl, name) for name in _trl.__all__)

    def test_the_tested_version(self):
        assert Version("1.16") <= Version(trl.__version__) < Version("1.17")

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
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))
            targets = [t for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.AnnAssign) for t in ast.walk(n)]
            return {
                t.attr
                for t in targets
                if isinstance(t, ast.Attribute)
                and isinstance(t.ctx, ast.Store)
                and getattr(t.value, "id", "") == "self"
            }

        assert attributes(_trl.GKDTrainer) <= attributes(PromptKDTrainer)

    def test_hooks_of_the_trainer_that_we_override(self):
        expected = {
            "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
            "create_scheduler": ["self", "num_training_steps", "optimizer"],
            "_save_optimizer_and_scheduler": ["self", "output_dir"],
            "_load_optimizer_and_scheduler": ["self", "checkpoint"],
            "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
            "_load_best_model": ["self"],
            "_save_checkpoint": ["self", "model", "trial"],
            "_get_output_dir": ["self", "trial"],
            "_push_from_checkpoint": ["self", "checkpoint_folder"],
            "init_hf_repo": ["self", "token", "private"],
            "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
            "save_model": ["self", "output_dir", "_internal_call"],
        }
        for name, names in expected.items():
            assert parameters(getattr(Trainer, name)) == names
        assert "loss_is_scaled_for_ga" in inspect.getsource(Trainer.training_step)

    def test_the_fused_forward_is_an_instance_attribute(self):
        """Self-distillation drops it from its copy of the student."""
        assert "model.forward = " in inspect.getsource(trl.trainer.utils.add_fused_lm_head)

    def test_what_shards_the_teacher(self):
        assert parameters(_trl.fsdp2_prepare_model) == ["accelerator", "model"]
        assert parameters(_trl.prepare_deepspeed) == ["model", "accelerator"]

    def test_old_checkpoints_go_at_the_end_of_saving(self):
        """`save_total_limit` is lifted around it; what it does with the limit is then done by us."""
        assert "rotate_checkpoints(" in inspect.getsource(Trainer._save_checkpoint)
        names = {"output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"}
        assert names <= set(parameters(rotate_checkpoints))

    def test_a_loop_of_ones_own_does_not_get_synced_gpus(self):
        """Which is why it is bound to it; once it is handed on, binding it twice would be an error."""
        source = inspect.getsource(GenerationMixin._extract_generation_mode_kwargs)
        assert "generation_mode_kwargs = {k: kwargs.pop(k) for k in new_custom_keys if k in kwargs}" in source


class TestImports:
    def test_only_one_module_imports_what_is_private(self):
        for path in PACKAGE.rglob("*.py"):
            if path.name == "_trl.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    assert not name.startswith(("trl.", "peft.tuners", "peft.utils")), f"{path.name} imports {name}"

    def test_imports_point_up_the_readmes_list(self):
        order = [
            "_trl",
            "divergences",
            "files",
            "config_checks",
            "forward",
            "chunked_loss",
            "teacher",
            "prompt_encoder",
            "data",
            "rollouts",
            "vllm_rollouts",
            "sampling_config",
            "promptkd_config",
            "checks",
            "promptkd_loss",
            "prompt_optimizer",
            "telemetry",
            "hub",
            "checkpoints",
            "model_card",
            "promptkd_trainer",
            "sandbox",
            "priming",
            "primed_collator",
            "primed_distill_loss",
            "teacher_answers",
            "quantization_receipt",
            "teacher_cache",
            "primed_distill_config",
            "primed_distill_trainer",
            "metrics",
            "evaluation",
            "analysis",
            "callbacks",
            "doctor",
            "cli",
        ]
        modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
        folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
        assert modules | folders == set(order)
        for name in order:
            inside = PACKAGE / name
            files = sorted(inside.glob("*.py")) if name in folders else [PACKAGE / f"{name}.py"]
            for path in files:
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.ImportFrom) and node.level == 1 + (name in folders) and node.module:
                        assert order.index(node.module.split(".")[0]) < order.index(name), (
                            f"{path} imports {node.module}"
                        )

    @pytest.mark.parametrize(
        ("folder", "order"),
        [
            ("teacher_cache", ["codec", "manifest", "hub", "reader", "writer", "builder", "verify", "__init__"]),
            ("doctor", ["case", "data_checks", "model_checks", "memory", "diagnosis", "__init__"]),
            ("metrics", ["numbers", "words", "sentences", "own_part", "answers", "scores", "__init__"]),
            ("evaluation", ["rows", "answers", "scores", "__init__"]),
            (
                "analysis",
                [
                    *("figures", "asking", "saved_prompt", "token_classes"),
                    *(
                        "exposure",
                        "prompt",
                        "prompt_report",
                        "attention_layers",
                        "attention",
                        "attention_plots",
                        "__init__",
                    ),
                ],
            ),
            (
                "cli",
                [
                    *("common", "cache", "doctor", "eval", "analyze_common", "analyze_exposure", "analyze_prompt"),
                    *("analyze_attention", "analyze", "__init__", "__main__"),
                ],
            ),
        ],
    )
    def test_imports_inside_a_folder_point_up_its_list(self, folder, order):
        files = {path.stem: path for path in (PACKAGE / folder).glob("*.py")}
        assert set(files) == set(order)
        for name, path in files.items():
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                    assert order.index(node.module) < order.index(name), f"{path} imports {node.module}"

    def test_tensor_code_imports_neither_trl_nor_trainers(self):
        for name in ("divergences", "promptkd_loss", "primed_distill_loss"):
            assert "_trl" not in (PACKAGE / f"{name}.py").read_text()

    def test_no_pickle(self):
        for path in PACKAGE.rglob("*.py"):
            text = path.read_text()
            assert "pickle" not in text, path
            assert "torch.load" not in text, path
            assert "torch.save" not in text, path


def test_torch_is_the_tested_one_or_newer():
    assert Version(torch.__version__.split("+")[0]) >= Version("2.9")
