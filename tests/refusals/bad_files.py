"""Files and folders: templates, checkpoints, teacher caches, answers."""

import re
from functools import partial
from pathlib import Path

from case import Case, cache, call, cut_short, from_cache, primed, promptkd, soft_prompt, written
from tiny import answered_dataset, chat_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import PrimedDistillTrainer, PrimingTemplate, PromptKDTrainer, TeacherCache, merge_teacher_caches
from trl_promptkd.evaluation import evaluate_model


SAVES = {"save_strategy": "steps", "save_steps": 1}
PROMPT_FILE = Path("teacher_prompt", "prompt_encoder.safetensors")


def priming_file(content):
    return lambda: PrimingTemplate.from_file(written("priming.txt", content))


def template_file(content):
    return lambda: promptkd(train_dataset=chat_dataset(2), args={"chat_template_path": written("chat.jinja", content)})


def other_prompt_size():
    soft_prompt(3).save_adapter("teacher_prompt")
    soft_prompt(7).load_parameters("teacher_prompt")


def prompt_cut_short():
    soft_prompt().save_adapter("teacher_prompt")
    cut_short(PROMPT_FILE)
    soft_prompt().load_parameters("teacher_prompt")


def weights_alone():
    trainer = primed(
        model=tiny_model(seed=1), teacher_model=tiny_model(seed=2), args={**SAVES, "save_only_model": True}
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=True)


def without_prompt_state():
    trainer = promptkd(model=tiny_model(seed=1), teacher_model=tiny_model(seed=2), args=SAVES)
    trainer.train()
    Path("run/checkpoint-1/prompt_training_state.safetensors").unlink()
    trainer.train(resume_from_checkpoint="run/checkpoint-1")


def spoiled_cache(name, spoil):
    """Opens a cache one of whose files was spoiled."""

    def run():
        (path,) = Path(cache()).glob(name)
        spoil(path)
        TeacherCache("cache")

    return run


def forget_shards(manifest):
    manifest.write_text(re.sub(r'"shards": \[.*?\n \]', '"shards": []', manifest.read_text(), flags=re.DOTALL))


def other_preset():
    cache(preset="standard")
    cache(preset="tiny")


def merged(parts, **settings_of_the_second):
    """Builds parts of a cache and merges them."""
    settings = [{}, settings_of_the_second]
    folders = [cache(f"host{i}", part=part, **settings[i]) for i, part in enumerate(parts)]
    merge_teacher_caches(folders, "merged")


def damaged_answers():
    settings = {"max_new_tokens": 2, "output_dir": "answers"}
    for _ in range(2):
        evaluate_model(tiny_model(), tiny_tokenizer(), {"rows": answered_dataset(2)}, **settings)
        for path in Path("answers").iterdir():
            path.write_text("{}")


TEMPLATES = [
    call(PrimingTemplate.from_file, "priming.txt | Check the path", FileNotFoundError, path="priming.txt"),
    Case("a priming text in another encoding", priming_file("é".encode("latin1")), "not UTF-8 | Save it as UTF-8"),
    Case("an empty file with a priming text", priming_file("\n"), "says nothing | set `priming=None`"),
    Case(
        "a priming text with an unknown filter",
        priming_file("{{ a | shout }}"),
        "No filter named 'shout' | (line 1) | Text that contains",
    ),
    call(
        PromptKDTrainer,
        "none.jinja | `chat_template_path` | Check the path",
        FileNotFoundError,
        args={"chat_template_path": "none.jinja"},
    ),
    call(
        PromptKDTrainer,
        "`chat_template_path` is 'org/model' | only a .jinja or .j2 file",
        args={"chat_template_path": "org/model"},
    ),
    Case("an empty `chat_template_path`", template_file(""), "chat.jinja | is empty | Write a template"),
    Case(
        "a `chat_template_path` that is no Jinja",
        template_file("{{ messages"),
        "not valid Jinja | Correct the file of `chat_template_path`",
    ),
    call(PrimedDistillTrainer, "`model` is './none' | Check the path", FileNotFoundError, model="./none"),
    call(PromptKDTrainer, "`teacher_model` is './none' | Check the path", FileNotFoundError, teacher_model="./none"),
]
CHECKPOINTS = [
    Case(
        "resuming from a checkpoint without a soft prompt",
        lambda: soft_prompt().load_parameters("."),
        "prompt_encoder.safetensors is missing | Resume from another checkpoint",
        FileNotFoundError,
        needs_weights=True,
    ),
    Case(
        "resuming with another `num_virtual_tokens`",
        other_prompt_size,
        "prompt_encoder.safetensors | (3, 32) | (7, 32) | Resume with the `PromptEncoderConfig`",
        needs_weights=True,
    ),
    Case(
        "resuming from a checkpoint that was cut off",
        prompt_cut_short,
        "prompt_encoder.safetensors | Resume from another checkpoint",
        needs_weights=True,
    ),
    Case(
        "resuming from a checkpoint with a file missing",
        without_prompt_state,
        "prompt_training_state.safetensors is missing | Resume from an older one | `resume_from_checkpoint=True`",
        needs_weights=True,
    ),
    Case(
        "resuming from a checkpoint that was saved with `save_only_model=True`",
        weights_alone,
        "checkpoint-1 | `save_only_model=True` | Set `save_only_model=False`",
        needs_weights=True,
    ),
    Case(
        "answers of an evaluation, in `output_dir`, that are damaged",
        damaged_answers,
        ".jsonl, line 1, is no answer | Delete the file",
    ),
]
CACHES = [
    call(
        PrimedDistillTrainer,
        "'no/such-cache' is neither a folder nor a data set on the Hub | `build_teacher_cache`",
        FileNotFoundError,
        teacher_model=None,
        teacher_cache="no/such-cache",
    ),
    call(
        PrimedDistillTrainer,
        "`teacher_cache` is a int | a `TeacherCache`",
        TypeError,
        teacher_model=None,
        teacher_cache=3,
    ),
    Case(
        "a `teacher_cache` folder without a cache",
        partial(primed, teacher_model=None, teacher_cache="."),
        "no manifest.json | Build one with",
        FileNotFoundError,
    ),
    Case(
        "a cache whose build was killed",
        spoiled_cache("manifest.json", forget_shards),
        "is not finished | Build it again with the same arguments",
    ),
    Case(
        "a cache with a damaged shard",
        spoiled_cache("*.parquet", cut_short),
        ".parquet is damaged | Delete it and build the cache again",
    ),
    Case(
        "a cache with a missing shard",
        spoiled_cache("*.parquet", Path.unlink),
        ".parquet is missing | Build the cache again",
        FileNotFoundError,
    ),
    Case(
        "a cache with a damaged manifest",
        spoiled_cache("manifest.json", cut_short),
        "manifest.json is not JSON | build it again",
    ),
    Case(
        "a cache of another tokenizer",
        partial(from_cache, processing_class=tiny_tokenizer(["imagine", "a"])),
        "40 there, 8 here | Pass the `processing_class` it was made with",
    ),
    Case(
        "a cache of another priming text",
        partial(from_cache, priming=None),
        "another priming | Pass the `priming` it was made with",
    ),
    Case(
        "a `kd_temperature` that the cache does not serve",
        partial(from_cache, args={"kd_temperature": 2.0}),
        "`kd_temperature` is 2.0 | Set `kd_temperature=1.0`",
    ),
    Case(
        "`response_source='teacher'`, and a cache of the data's answers",
        partial(from_cache, args={"response_source": "teacher"}),
        "`response_source` is 'teacher' | Set `response_source='dataset'`",
    ),
    Case(
        "building a cache into the folder of another one",
        other_preset,
        "`preset` is 'standard' there and 'tiny' here | Choose another `output_dir`",
    ),
]
CACHES += [
    Case(
        "building part 2 of a cache without the coordinates of part 1",
        partial(cache, part="2/3"),
        "`part` is '2/3', but `basis` is missing | Start that one first | copy that file here and pass its path",
    ),
    Case(
        "merging the parts of a cache, of which one is not named",
        partial(merged, ["1/2"]),
        "1 of 2 parts are missing (2/2) | Name all of them",
    ),
    Case(
        "merging parts of two caches",
        partial(merged, ["1/2", "1/3"], preset="tiny"),
        "host0 (there) and host1 (here) are not parts of one cache: `preset` is 'standard' there and 'tiny' here",
    ),
    Case(
        "training on a part of a cache",
        lambda: primed(teacher_model=None, teacher_cache=cache(part="1/2")),
        "part 1/2 of one | Merge its parts: `trl-promptkd cache merge OUT PART...`",
    ),
]
CASES = TEMPLATES + CHECKPOINTS + CACHES
