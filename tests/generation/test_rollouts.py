import itertools

import pytest
import torch
from reference import greedy
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from trl_promptkd.generation.rollouts import _Draw, generate_completions, have_ended, own_random_state, rollout_seed


PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]
EOS = 0


def config(**settings):
    defaults = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "pad_token_id": EOS, "eos_token_id": [EOS]}
    return GenerationConfig(**{**defaults, **settings})


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def sample(model, seed=0, vocab_size=None, **settings):
    with own_random_state(seed, torch.device("cpu")):
        return generate_completions(model, PROMPTS, config(**settings), vocab_size=vocab_size)


class TestGenerateCompletions:
    @pytest.mark.parametrize("batch_size", [None, 1, 2])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    def test_greedy_equals_each_prompt_alone_without_cache(self, family, batch_size):
        model = tiny_model(family)
        got = generate_completions(model, PROMPTS, config(**GREEDY), batch_size)
        assert got == [greedy(model, prompt, 8, EOS) for prompt in PROMPTS]

    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
    def test_greedy_behind_a_soft_prompt_equals_each_prompt_alone(self, family):
        model = tiny_model(family)
        soft_prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
        got = generate_completions(model, PROMPTS, config(**GREEDY), soft_prompt=soft_prompt)
        assert got == [greedy(model, prompt, 8, EOS, soft_prompt) for prompt in PROMPTS]
        assert got != [greedy(model, prompt, 8, EOS) for prompt in PROMPTS]

    def test_a_completion_ends_with_its_first_end_of_text(self):
        completions = [ids for seed in range(20) for ids in sample(tiny_model(), seed)]
        ended = [ids for ids in completions if EOS in ids]
        assert ended
        assert all(ids.index(EOS) == len(ids) - 1 for ids in ended)
        assert all(len(ids) == 8 for ids in completions if EOS not in ids)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_the_cache_is_used(self, checkpointing):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        widths = []
        model.model.layers[0].register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
        sample(model)
        assert widths[0] == 5
        assert len(widths) > 1
        assert set(widths[1:]) == {1}
        assert model.training

    def test_every_module_keeps_its_training_mode(self):
        model = tiny_model().train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        sample(model)
        assert [module.training for module in model.modules()] == modes
        assert len(set(modes)) == 2

    def test_the_published_generation_config_plays_no_part(self):
        model = tiny_model()
        expected = sample(model)
        model.generation_config.update(repetition_penalty=5.0, top_k=1, temperature=0.1, min_p=0.9)
        published = model.generation_config
        assert sample(model) == expected
        assert model.generation_config is published

    def test_ids_beyond_the_vocabulary_are_never_sampled(self):
        model = tiny_model()
        highest = {
            size: max(token for seed in range(5) for ids in sample(model, seed, size) for token in ids)
            for size in (None, 30)
        }
        assert highest[30] < 30 <= highest[None]


class TestStopStrings:
    """The tiny tokenizer's ids 6 to 29 are words; none of them is within another."""

    @pytest.mark.parametrize("pad", [EOS, 5])
    @pytest.mark.parametrize("batch_size", [None, 1])
    @pytest.mark.parametrize("do_sample", [False, True])
    def test_a_completion_ends_with_its_first_stop_string(self, do_sample, batch_size, pad):
        model, tokenizer = tiny_model(), tiny_tokenizer()
        settings = config(do_sample=do_sample, pad_token_id=pad, max_new_tokens=12)
        settings.suppress_tokens = list(range(1, 6)) + list(range(30, 40))
        seeds = range(len(PROMPTS))
        free = generate_completions(model, PROMPTS, settings, batch_size, row_seeds=seeds)
        stops = [free[0][2], free[1][4], PROMPTS[2][-1]]  # the last one stands in a prompt too, where it ends nothing
        settings.stop_strings = [tokenizer.convert_ids_to_tokens(stop) for stop in stops]
        expected = [ids[: next((i + 1 for i, t in enumerate(ids) if t in stops), len(ids))] for ids in free]
        assert {len(ids) for ids in expected} != {len(ids) for ids in free}
        got = generate_completions(model, PROMPTS, settings, batch_size, row_seeds=seeds, tokenizer=tokenizer)
        assert got == expected
        assert settings.stop_strings is not None
        ended = [ids[-1] in (EOS, *stops) for ids in got]
        assert have_ended([*got, [7] * 12], settings, tokenizer) == [*ended, False]

    @pytest.mark.parametrize("string", ["cat", ["cat"]])
    def test_counted_as_ended_at_the_last_possible_token_too(self, string):
        tokenizer = tiny_tokenizer()
        cat, dog = tokenizer.convert_tokens_to_ids(["cat", "dog"])
        rows = [[dog] * 7 + [cat], [dog] * 8, [dog, EOS], []]
        assert have_ended(rows, config(stop_strings=string), tokenizer) == [True, False, True, False]
        assert have_ended(rows, config(), tokenizer) == [False, False, True, False]


class TestDrawing:
    """On a CPU, in place of `torch.multinomial`."""

    def test_frequencies_are_the_probabilities(self):
        logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0, -1.0, float("-inf")]])
        torch.manual_seed(0)
        drawn = _Draw()(None, logits.expand(40_000, -1)).argmax(dim=-1)
        shares = torch.bincount(drawn, minlength=6) / len(drawn)
        expected = logits[0].softmax(dim=-1)
        assert shares[2] == shares[5] == 0
        spread = (expected * (1 - expected) / len(drawn)).sqrt()
        assert ((shares - expected).abs() <= 4 * spread).all()

    def test_the_ends_of_the_interval(self, monkeypatch):
        logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
        for number, token in ((0.0, 1), (0.499999, 1), (0.5, 3), (1 - 2**-53, 3)):
            monkeypatch.setattr(torch, "rand", lambda *_, n=number, **__: torch.full((1, 1), n, dtype=torch.float64))
            assert _Draw()(None, logits).argmax().item() == token

    def test_top_k_and_temperature_come_first(self):
        model, settings = tiny_model(), config(top_k=1, temperature=0.5)
        drawn = generate_completions(model, PROMPTS, settings)
        assert drawn == generate_completions(model, PROMPTS, config(**GREEDY))
        assert settings.do_sample  # the caller's own stays


def test_rows_are_sampled_beside_those_of_their_length_and_returned_in_order():
    model, settings = tiny_model(), config(**GREEDY)
    prompts = [[7, 8, 9, 10], [11], [12, 13, 14], [15, 16]]
    together, shapes = generate_completions(model, prompts, settings), []
    model.register_forward_pre_hook(lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    assert generate_completions(model, prompts, settings, batch_size=2) == together
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 4), (2, 2)]


class TestOwnRandomState:
    def test_the_global_state_is_left_alone(self):
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        with own_random_state(5, torch.device("cpu")):
            first = torch.rand(3)
        torch.testing.assert_close(torch.rand(3), expected)
        with own_random_state(5, torch.device("cpu")):
            torch.testing.assert_close(torch.rand(3), first)

    def test_what_was_drawn_before_does_not_matter(self):
        model = tiny_model()
        first = sample(model, 3)
        torch.rand(100)
        assert sample(model, 3) == first
        assert sample(model, 4) != first

    def test_seeds_differ_in_every_part(self):
        seeds = {
            rollout_seed(*parts) for parts in itertools.product((0, 1), ("student", "teacher"), (-1, 0, 1), (0, 1))
        }
        assert len(seeds) == 24
        assert all(0 <= seed < 2**63 for seed in seeds)


class TestPaddedVocabulary:
    """36 words of 48 entries: those that stand for no token are never sampled."""

    def test_the_users_own_suppressed_tokens_stay_suppressed(self):
        banned = list(range(1, 30))
        settings = config(max_new_tokens=12, suppress_tokens=banned)
        model = tiny_model(vocab_size=48)
        for sampled in generate_completions(model, [[7, 8], [9]] * 4, settings, vocab_size=40):
            assert not {*banned, *range(40, 48)} & set(sampled)

    def test_a_head_that_is_wider_than_its_configuration(self):
        model = tiny_model(vocab_size=48)
        model.config.vocab_size = 40
        with torch.no_grad():
            model.get_output_embeddings().weight[40:] += 1.0
        samples = generate_completions(model, [[7, 8], [9]] * 4, config(max_new_tokens=12), vocab_size=40)
        assert max(max(ids) for ids in samples) < 40
