"""Token ids of rows, with tokenizers like SentencePiece's, GPT-2's and T5's that are built by hand."""

import pytest
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trl_promptkd import PrimingTemplate
from trl_promptkd.data.tokenize import _without_blank_tail, tokenize_primed_row, tokenize_row


THE, CAT, SAT, ON, MAT, EOS, UNK = 12, 13, 15, 16, 17, 0, 1
WORDS = [["▁", "s", "t", "d"], [":", ":"], ["v", "e", "c", "t", "o", "r"], ["r", "e", "d"], ["▁", "r", "e", "d"]]


def with_suffix(template="$A <eos>", **tokens):
    """A tokenizer that ends each text itself, as T5's does, and Llama's with `add_eos_token`."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<eos>", EOS), ("<system>", 4)]
    )
    return tokenizer


def merges_of(words):
    """Merges that build each word from its left."""
    return list(dict.fromkeys(("".join(word[:i]), word[i]) for word in words for i in range(1, len(word))))


def pieces(kind, words=WORDS, unk_token="<unk>"):
    """A BPE or Unigram tokenizer that writes spaces as "▁", or one of bytes; see `ALL_KINDS`."""
    merges = merges_of(words)
    tokens = ["</s>", "<unk>", *map(chr, range(33, 127)), "▁", "Ġ", "Ċ", *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    if kind == "unigram":
        backend = Tokenizer(models.Unigram([(token, -1.0) for token in vocab], unk_id=1))
    else:
        backend = Tokenizer(models.BPE(vocab, merges, unk_token=unk_token))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    elif kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        scheme = "always" if kind == "metaspace-always" else "first"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token=unk_token, pad_token="</s>")


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


class TestWhoseTokens:
    """The user's own special tokens stay; what the tokenizer adds after a text goes."""

    def test_an_end_of_text_of_the_users_own_ends_a_prompt(self, tokenizer):
        row = tokenize_row({"prompt": "the cat <eos>", "completion": " sat on"}, tokenizer)
        assert row == {"prompt_ids": [THE, CAT, EOS], "completion_ids": [SAT, ON, EOS]}

    def test_an_end_of_text_of_the_users_own_ends_a_prompt_alone(self, tokenizer):
        assert tokenize_row({"prompt": "the cat <eos>"}, tokenizer)["prompt_ids"] == [THE, CAT, EOS]

    def test_an_end_of_text_in_an_answer_does_not_cut_it(self, tokenizer):
        row = tokenize_row({"prompt": "the", "completion": " sat <eos> on"}, tokenizer)
        assert row["completion_ids"] == [SAT, EOS, ON, EOS]

    def test_an_end_of_text_at_the_start_of_an_answer_stays(self, tokenizer):
        row = tokenize_row({"prompt": "the", "completion": " <eos> sat on"}, tokenizer)
        assert row["completion_ids"] == [EOS, SAT, ON, EOS]

    def test_an_end_of_text_at_the_end_of_an_answer_is_not_doubled(self, tokenizer):
        for completion in (" sat <eos>", " sat <eos> \n"):
            assert tokenize_row({"prompt": "the", "completion": completion}, tokenizer)["completion_ids"] == [SAT, EOS]

    @pytest.mark.parametrize(
        ("template", "before"),
        [("$A <eos>", []), ("<system> $A <eos>", [4]), ("<eos> $A <eos>", [EOS]), ("<system> $A", [4])],
    )
    def test_what_the_tokenizer_adds_after_a_text_is_not_in_a_prompt(self, template, before):
        tokenizer = with_suffix(template)
        assert tokenize_row({"prompt": "the cat"}, tokenizer)["prompt_ids"] == [*before, THE, CAT]
        row = tokenize_row({"prompt": "the cat <eos>", "completion": " sat <eos> on"}, tokenizer)
        assert row == {"prompt_ids": [*before, THE, CAT, EOS], "completion_ids": [SAT, EOS, ON, EOS]}
        row = tokenize_row({"prompt": "<eos> the", "completion": " sat"}, tokenizer)
        assert row == {"prompt_ids": [*before, EOS, THE], "completion_ids": [SAT, EOS]}

    def test_primed_prompts_keep_the_users_own_tokens(self):
        for tokenizer in (tiny_tokenizer(), with_suffix()):
            row = {"prompt": "the cat <eos>", "completion": " sat <eos> on"}
            assert tokenize_primed_row(row, tokenizer, PrimingTemplate("mat ")) == {
                "prompt_ids": [THE, CAT, EOS],
                "teacher_prompt_ids": [MAT, THE, CAT, EOS],
                "completion_ids": [SAT, EOS, ON, EOS],
            }

    def test_an_answer_that_quotes_the_end_of_text_in_a_conversation_is_whole(self, tokenizer):
        messages = [{"role": "user", "content": "the <eos> cat"}, {"role": "assistant", "content": "sat <eos> on"}]
        row = tokenize_row({"messages": messages}, tokenizer)
        assert row == {"prompt_ids": [2, THE, EOS, CAT, 3], "completion_ids": [SAT, EOS, ON, EOS]}

    def test_a_quoted_end_of_text_does_not_end_the_turn_of_a_template_without_one(self, tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<system> \n")  # its turns end otherwise
        messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "sat <eos> on"}]
        assert tokenize_row({"messages": messages}, tokenizer)["completion_ids"] == [SAT, EOS, ON, 4]

    def test_text_after_the_last_special_token_stays(self, tokenizer):
        assert _without_blank_tail([SAT, EOS, ON], tokenizer) == [SAT, EOS, ON]

    def test_an_answer_that_the_tokenizer_does_not_know_at_all_is_refused(self):
        tokenizer = pieces("bytes", unk_token=None)
        with pytest.raises(ValueError, match="The tokenizer writes nothing of the answer 'é'"):
            tokenize_row({"prompt": "red", "completion": "é"}, tokenizer)


ALL_KINDS = ["metaspace-first", "metaspace-always", "normalizer", "unigram", "bytes"]


class TestBorder:
    """What is trained on is the text of prompt and completion, joined."""

    @pytest.mark.parametrize("kind", ALL_KINDS)
    @pytest.mark.parametrize(
        ("prompt", "completion"),
        [
            ("std:", ":vector"),
            ("std", "::vector"),
            ("std:", "vector"),
            ("std", " vector"),
            ("std ", "vector"),
            ("re", "d"),
            ("std: re", "d"),
            ("std:\n", "red"),
            ("a", "red"),
            (" ", "red"),
        ],
    )
    def test_the_text_is_the_prompt_and_the_completion(self, kind, prompt, completion):
        tokenizer = pieces(kind)
        row = tokenize_row({"prompt": prompt, "completion": completion}, tokenizer)
        text = prompt.replace("\n", "<unk>" if kind != "bytes" else "\n") + completion + "</s>"
        assert tokenizer.decode([*row["prompt_ids"], *row["completion_ids"]]).lstrip() == text.lstrip()
        completed = tokenizer.decode(row["completion_ids"]).lstrip()
        assert completed.endswith((completion + "</s>").lstrip())  # all of the completion is trained on
        assert row["prompt_ids"]

    def test_a_token_over_the_border_belongs_to_the_completion(self):
        tokenizer = pieces("metaspace-first")
        row = tokenize_row({"prompt": "std:", "completion": ":vector"}, tokenizer)
        assert tokens(tokenizer, row["prompt_ids"]) == ["▁std"]
        assert tokens(tokenizer, row["completion_ids"]) == ["::", "vector", "</s>"]

    def test_a_completion_gets_no_space_of_the_tokenizers_own(self):
        tokenizer = pieces("metaspace-first", [["▁", "s", "t", "d"], ["v", "e"]])  # "::" is not merged
        row = tokenize_row({"prompt": "std:", "completion": ":ve"}, tokenizer)
        assert tokens(tokenizer, row["prompt_ids"] + row["completion_ids"]) == ["▁std", ":", ":", "ve", "</s>"]

    def test_no_prompt_is_swallowed(self):
        tokenizer = pieces("metaspace-first")
        row = tokenize_row({"prompt": "r", "completion": "ed"}, tokenizer)  # "▁red" is one token
        assert tokenizer.decode(row["prompt_ids"]) == "r"
        assert tokens(tokenizer, row["completion_ids"]) == ["e", "d", "</s>"]

    def test_a_prompt_that_is_cut_otherwise_before_the_border_keeps_what_it_can(self):
        tokenizer = pieces("bytes", [["c", "d"], ["b", "cd"], ["a", "b"]])
        row = tokenize_row({"prompt": "xabc", "completion": "d"}, tokenizer)  # alone: x ab c, together: x a bcd
        assert tokens(tokenizer, row["prompt_ids"]) == ["x", "a"]
        assert tokens(tokenizer, row["completion_ids"]) == ["bcd", "</s>"]

    def test_white_space_that_a_special_token_takes_in_does_not_move_it(self):
        tokenizer = pieces("bytes")
        turn = AddedToken("<|turn|>", rstrip=True, special=True)  # as Phi-3's
        tokenizer.backend_tokenizer.add_special_tokens([turn])
        row = tokenize_row({"prompt": "a<|turn|>", "completion": " red"}, tokenizer)
        assert tokens(tokenizer, row["prompt_ids"]) == ["a", "<|turn|>"]
        assert tokens(tokenizer, row["completion_ids"]) == ["red", "</s>"]

    def test_unknown_text_on_both_sides_is_kept(self):
        """One unknown token for both would hide the completion's in the prompt."""
        tokenizer = pieces("unigram")
        row = tokenize_row({"prompt": "red é", "completion": "é red"}, tokenizer)
        assert (row["prompt_ids"] + row["completion_ids"]).count(UNK) == 2
        assert row["completion_ids"][0] == UNK

    def test_unknown_words_are_kept_apart(self, tokenizer):
        row = tokenize_row({"prompt": "the wolf", "completion": "ling sat"}, tokenizer)
        assert row == {"prompt_ids": [THE, UNK], "completion_ids": [UNK, SAT, EOS]}


class TestBorderInBothViews:
    @pytest.mark.parametrize("kind", ALL_KINDS)
    @pytest.mark.parametrize(
        ("text", "placement"), [("red ", "prefix"), (" red", "suffix"), (":", "suffix"), ("r", "suffix")]
    )
    @pytest.mark.parametrize(
        ("prompt", "completion"), [("std:", ":vector"), ("std", " red"), ("std", "red"), ("a", "ed")]
    )
    def test_both_texts_are_right(self, kind, text, placement, prompt, completion):
        tokenizer = pieces(kind)
        row = tokenize_primed_row(
            {"prompt": prompt, "completion": completion}, tokenizer, PrimingTemplate(text, placement)
        )
        primed = text + prompt if placement == "prefix" else prompt + text
        assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"]) == prompt + completion + "</s>"
        assert tokenizer.decode(row["teacher_prompt_ids"] + row["completion_ids"]) == primed + completion + "</s>"

    def test_a_shared_border_token_stays_whole(self):
        tokenizer = pieces("metaspace-first")
        row = tokenize_primed_row({"prompt": "std:", "completion": ":vector"}, tokenizer, PrimingTemplate("a "))
        assert tokens(tokenizer, row["completion_ids"]) == ["::", "vector", "</s>"]
        assert tokenizer.decode(row["teacher_prompt_ids"]) == "a std"

    def test_another_end_of_the_prompt_keeps_them_apart(self):
        tokenizer = pieces("metaspace-first")
        row = tokenize_primed_row(
            {"prompt": "std:", "completion": ":vector"}, tokenizer, PrimingTemplate(" a", "suffix")
        )
        assert tokens(tokenizer, row["completion_ids"]) == [":", "vector", "</s>"]
        assert tokens(tokenizer, row["prompt_ids"]) == ["▁std", ":"]
