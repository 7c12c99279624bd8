"""Token ids of rows, with tokenizers like SentencePiece's, GPT-2's and T5's that are built by hand."""

from types import SimpleNamespace

import pytest
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trl_promptkd import PrimingTemplate
from trl_promptkd.data.rows import check_ids
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


def tokenized(tokenizer, prompt, completion):
    """Both lists of ids of a row of texts."""
    row = tokenize_row({"prompt": prompt, "completion": completion}, tokenizer)
    return row["prompt_ids"], row["completion_ids"]


class TestRows:
    CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]

    @pytest.mark.parametrize(
        ("row", "prompt_ids", "completion_ids"),
        [
            ({"messages": CHAT}, [2, THE, CAT, 3], [SAT, ON, EOS]),
            ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [2, THE, CAT, 3], [SAT, ON, EOS]),
            ({"prompt": CHAT[:1]}, [2, THE, CAT, 3], []),
            ({"prompt": "the cat", "completion": " sat on"}, [THE, CAT], [SAT, ON, EOS]),
            ({"prompt": "the cat"}, [THE, CAT], []),
            ({"prompt_ids": [5], "completion_ids": [6, 7]}, [5], [6, 7]),
        ],
    )
    def test_forms(self, row, prompt_ids, completion_ids, tokenizer):
        assert tokenize_row(row, tokenizer) == {"prompt_ids": prompt_ids, "completion_ids": completion_ids}

    def test_what_the_template_writes_after_the_end_is_dropped(self, tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<eos> . ")
        assert tokenize_row({"messages": self.CHAT}, tokenizer)["completion_ids"] == [SAT, ON, EOS]

    def test_white_space_after_a_turns_own_end_token_is_dropped(self):
        special = SimpleNamespace(special=True)
        gemma = SimpleNamespace(
            added_tokens_decoder={7: special}, decode=lambda ids: "".join(" x"[i % 2] for i in ids)
        )
        assert _without_blank_tail([1, 7, 4], gemma) == [1, 7]  # 4 is a line break
        assert _without_blank_tail([1, 7, 3], gemma) == [1, 7, 3]  # 3 is text
        assert _without_blank_tail([1, 4], gemma) == [1, 4]

    def test_tools_may_be_json(self, tokenizer):
        tokenizer.chat_template = "{% if tools %}red {{ tools[0]['name'] }} {% endif %}" + tokenizer.chat_template
        row = {"messages": self.CHAT, "tools": '[{"name": "cat"}]'}
        assert tokenize_row(row, tokenizer)["prompt_ids"][1:] == [CAT, 2, THE, CAT, 3]
        assert tokenize_row({**row, "tools": []}, tokenizer)["prompt_ids"] == [2, THE, CAT, 3]

    def test_ids_may_have_gaps(self, tokenizer):
        tokenizer.get_vocab = lambda: {"a": 5, "b": 500}
        check_ids("prompt_ids", [5, 500], tokenizer)
        with pytest.raises(ValueError, match="`prompt_ids` hold the id 499"):
            check_ids("prompt_ids", [5, 499], tokenizer)


class TestWhoseTokens:
    """The user's own special tokens stay; what the tokenizer adds after a text goes."""

    @pytest.mark.parametrize(
        ("prompt", "completion", "prompt_ids", "completion_ids"),
        [
            ("the cat <eos>", " sat on", [THE, CAT, EOS], [SAT, ON, EOS]),
            ("the cat <eos>", None, [THE, CAT, EOS], []),
            ("the", " sat <eos> on", [THE], [SAT, EOS, ON, EOS]),
            ("the", " <eos> sat on", [THE], [EOS, SAT, ON, EOS]),
            ("the", " sat <eos>", [THE], [SAT, EOS]),
            ("the", " sat <eos> \n", [THE], [SAT, EOS]),
        ],
    )
    def test_an_end_of_text_of_the_users_own_stays_and_is_not_doubled(
        self, prompt, completion, prompt_ids, completion_ids, tokenizer
    ):
        assert tokenized(tokenizer, prompt, completion) == (prompt_ids, completion_ids)

    @pytest.mark.parametrize(
        ("template", "before"),
        [("$A <eos>", []), ("<system> $A <eos>", [4]), ("<eos> $A <eos>", [EOS]), ("<system> $A", [4])],
    )
    def test_what_the_tokenizer_adds_after_a_text_is_not_in_a_prompt(self, template, before):
        tokenizer = with_suffix(template)
        assert tokenize_row({"prompt": "the cat"}, tokenizer)["prompt_ids"] == [*before, THE, CAT]
        both = tokenized(tokenizer, "the cat <eos>", " sat <eos> on")
        assert both == ([*before, THE, CAT, EOS], [SAT, EOS, ON, EOS])
        assert tokenized(tokenizer, "<eos> the", " sat") == ([*before, EOS, THE], [SAT, EOS])

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

    def test_an_answer_that_the_tokenizer_does_not_know_at_all_is_refused(self):
        with pytest.raises(ValueError, match="The tokenizer writes nothing of the answer 'é'"):
            tokenized(pieces("bytes", unk_token=None), "red", "é")


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

    @pytest.mark.parametrize(
        ("kind", "words", "prompt", "completion", "prompt_tokens", "completion_tokens"),
        [
            # A token over the border belongs to the completion
            ("metaspace-first", WORDS, "std:", ":vector", ["▁std"], ["::", "vector"]),
            # A completion gets no space of the tokenizer's own ("::" is not merged)
            ("metaspace-first", [["▁", "s", "t", "d"], ["v", "e"]], "std:", ":ve", ["▁std", ":"], [":", "ve"]),
            # No prompt is swallowed ("▁red" is one token)
            ("metaspace-first", WORDS, "r", "ed", ["▁r"], ["e", "d"]),
            # A prompt keeps what it can; alone: x ab c, together: x a bcd
            ("bytes", [["c", "d"], ["b", "cd"], ["a", "b"]], "xabc", "d", ["x", "a"], ["bcd"]),
        ],
    )
    def test_where_the_border_is(self, kind, words, prompt, completion, prompt_tokens, completion_tokens):
        tokenizer = pieces(kind, words)
        found = [tokens(tokenizer, ids) for ids in tokenized(tokenizer, prompt, completion)]
        assert found == [prompt_tokens, [*completion_tokens, "</s>"]]

    def test_white_space_that_a_special_token_takes_in_does_not_move_it(self):
        tokenizer = pieces("bytes")
        turn = AddedToken("<|turn|>", rstrip=True, special=True)  # as Phi-3's
        tokenizer.backend_tokenizer.add_special_tokens([turn])
        found = [tokens(tokenizer, ids) for ids in tokenized(tokenizer, "a<|turn|>", " red")]
        assert found == [["a", "<|turn|>"], ["red", "</s>"]]

    def test_unknown_text_on_both_sides_is_kept(self):
        """One unknown token for both would hide the completion's in the prompt."""
        prompt_ids, completion_ids = tokenized(pieces("unigram"), "red é", "é red")
        assert (prompt_ids + completion_ids).count(UNK) == 2
        assert completion_ids[0] == UNK

    def test_unknown_words_are_kept_apart(self, tokenizer):
        assert tokenized(tokenizer, "the wolf", "ling sat") == ([THE, UNK], [UNK, SAT, EOS])
        assert tokenized(tokenizer, "the cat", "sat on") == ([THE, CAT], [SAT, ON, EOS])


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

    def test_a_token_over_the_border_of_both_stays_whole(self):
        tokenizer, row = pieces("metaspace-first"), {"prompt": "std:", "completion": ":vector"}
        shared = tokenize_primed_row(row, tokenizer, PrimingTemplate("a "))
        assert tokens(tokenizer, shared["completion_ids"]) == ["::", "vector", "</s>"]
        assert tokenizer.decode(shared["teacher_prompt_ids"]) == "a std"
        apart = tokenize_primed_row(row, tokenizer, PrimingTemplate(" a", "suffix"))
        assert tokens(tokenizer, apart["completion_ids"]) == [":", "vector", "</s>"]
        assert tokens(tokenizer, apart["prompt_ids"]) == ["▁std", ":"]
