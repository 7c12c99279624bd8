"""The tokenizer of both models, and the check that they share one vocabulary."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import read_text
from .student import adapter_config
from .teacher import each_teacher


__all__ = [
    "check_same_tokenizer",
    "load_teacher_tokenizer",
    "load_tokenizer",
    "prepare_tokenizer",
    "shared_vocab_size",
]

logger = logging.get_logger(__name__)

_FILES = ("revision", "subfolder")


def load_tokenizer(
    name_or_path: str, init_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. If an adapter has none, its base model's is loaded."""
    known = (*_FILES, "gguf_file", "trust_remote_code")
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    kwargs |= {key: value for key, value in (init_kwargs or {}).items() if key in known and value is not None}
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError):
        adapter = adapter_config(name_or_path, init_kwargs)
        if adapter is None or not adapter.base_model_name_or_path:
            raise
    kwargs = {key: value for key, value in kwargs.items() if key not in _FILES}  # these are for the adapter
    name_or_path, revision = adapter.base_model_name_or_path, adapter.revision or "main"
    return AutoTokenizer.from_pretrained(name_or_path, revision=revision, **kwargs)


def load_teacher_tokenizer(
    name_or_path: str, init_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Load a teacher's tokenizer as [`load_tokenizer`] does. `None` if there is none to compare with."""
    try:
        return load_tokenizer(name_or_path, init_kwargs, trust_remote_code) if name_or_path else None
    except (OSError, ValueError):
        return None


def check_same_tokenizer(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Reject a teacher whose token ids mean other tokens than the student's, naming the first such id."""
    student_tokens = {index: token for token, index in student_tokenizer.get_vocab().items()}
    teacher_tokens = {index: token for token, index in teacher_tokenizer.get_vocab().items()}
    for index in sorted(student_tokens.keys() | teacher_tokens.keys()):
        if student_tokens.get(index) != teacher_tokens.get(index):
            raise ValueError(
                "The student and the teacher have different tokenizers: the first token that differs has id "
                f"{index}, which is {student_tokens.get(index)!r} for the student ({len(student_tokens)} tokens) and "
                f"{teacher_tokens.get(index)!r} for the teacher ({len(teacher_tokens)} tokens). Their distributions "
                "cannot be compared token by token. Choose two models of one family; if only a pad token was added to "
                "one of them, use the end-of-text token for padding instead."
            )


def shared_vocab_size(
    student: PreTrainedModel, teacher: PreTrainedModel | int, tokenizer: PreTrainedTokenizerBase
) -> int:
    """The number of real ids. Both models are compared on them, and sample from them.

    Models pad their vocabularies, and models of one family may pad to different sizes (Qwen2.5: 151,936 and 152,064).
    Padding stands for no token. Both models are therefore normalised and compared on the tokenizer's ids only.

    Args:
        teacher: The model, or the size of its vocabulary.
    """
    student_size = student.config.get_text_config().vocab_size
    teacher_size = teacher if isinstance(teacher, int) else teacher.config.get_text_config().vocab_size
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    real_size = max(tokens) + 1
    for role, size in (("student", student_size), ("teacher", teacher_size)):
        missing = [index for index in tokens if index >= size and index not in added]
        if missing:
            raise ValueError(
                f"The {role}'s vocabulary has {size} entries, but the tokenizer has {real_size} tokens, such as "
                f"{tokens[min(missing)]!r} with id {min(missing)}. Student, teacher and `processing_class` must share "
                "one tokenizer."
            )
    # Special tokens beyond both vocabularies (images in Gemma 3's text models) cannot occur in text
    return min(real_size, student_size, teacher_size)


def prepare_tokenizer(
    processing_class: PreTrainedTokenizerBase | None,
    model: PreTrainedModel | str,
    teacher_model: PreTrainedModel | str | Mapping[str, Any] | None,
    args: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer of both models, with a pad token and the settings in `args`.

    Raises:
        TypeError: if it is a processor of images or sound.
        OSError: if it cannot be loaded.
        ValueError: if it has nothing to pad with, if it lacks a special token of `args`, or if the teacher has another
            tokenizer.
    """
    if processing_class is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        if not name:
            raise ValueError("`processing_class` is missing, and `model` has no name to load a tokenizer by. Pass it.")
        try:
            processing_class = load_tokenizer(name, args.model_init_kwargs, args.trust_remote_code)
        except (OSError, ValueError) as error:
            raise OSError(
                f"No tokenizer could be loaded for the student {name!r}. Check the name, or pass the tokenizer as "
                f"`processing_class`. ({str(error).splitlines()[0]})"
            ) from error
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a {type(processing_class).__name__}; only tokenizers are supported. Pass "
            "`AutoTokenizer.from_pretrained(name)`, or a processor's `tokenizer`."
        )
    for field in ("eos_token", "pad_token"):
        token = getattr(args, field)
        if token is None:
            continue
        if token not in processing_class.get_vocab():
            raise ValueError(f"`{field}` is {token!r}, which the tokenizer does not have. Name one of its tokens.")
        setattr(processing_class, field, token)
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token  # safe, because masks come from lengths
    if processing_class.pad_token is None:
        raise ValueError("The tokenizer has neither a pad token nor an end-of-text token. Set `tokenizer.pad_token`.")
    if args.chat_template_path is not None:
        processing_class.chat_template = read_text(args.chat_template_path, "the chat template (`chat_template_path`)")
        if not processing_class.chat_template.strip():
            raise ValueError(
                f"{args.chat_template_path}, the file of `chat_template_path`, is empty. Write a template to it."
            )
    for argument, one in each_teacher(teacher_model).items():
        if one is None:
            continue
        name = one if isinstance(one, str) else one.config._name_or_path
        teacher_tokenizer = load_teacher_tokenizer(name, args.teacher_model_init_kwargs, args.trust_remote_code)
        if teacher_tokenizer is not None:
            try:
                check_same_tokenizer(processing_class, teacher_tokenizer)
            except ValueError as error:
                if one is teacher_model:
                    raise
                raise ValueError(f"{error} (Found in `{argument}`.)") from error
        elif isinstance(one, str):
            logger.warning(
                f"No tokenizer was found beside the teacher {name!r}, so that it could not be checked that both "
                "models share one. If they do not, training compares unrelated tokens."
            )
    return processing_class
