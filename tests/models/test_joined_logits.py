import pytest
import torch

from trl_promptkd.models.joined_logits import JoinedLogits


class Said:
    """Logits that are there."""

    def __init__(self, logits, entropies=None):
        self.all, self.drawn_from = logits, entropies

    def __len__(self):
        return len(self.all)

    def logits(self, start, end):
        return self.all[start:end]

    def entropies(self):
        return self.drawn_from


WHOLE = torch.arange(14.0).reshape(7, 2)
PLACES = {"a": torch.tensor([1, 4, 6]), "b": torch.tensor([0, 2, 3, 5]), "c": torch.tensor([], dtype=torch.long)}


def joined(**entropies):
    return JoinedLogits({name: (own, Said(WHOLE[own], entropies.get(name))) for name, own in PLACES.items()})


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_every_part_is_in_the_batchs_order(step):
    said = joined()
    assert len(said) == 7
    for start in range(0, 7, step):
        torch.testing.assert_close(said.logits(start, min(start + step, 7)), WHOLE[start : start + step])


def test_no_tokens_have_logits_of_the_right_width():
    assert joined().logits(0, 0).shape == (0, 2)


def test_entropies_are_known_where_tokens_are_drawn():
    assert joined().entropies() is None
    found = joined(a=torch.tensor([1.0, 2.0, 3.0])).entropies()
    assert found[PLACES["a"]].tolist() == [1.0, 2.0, 3.0]
    assert found[PLACES["b"]].isnan().all()


def test_another_number_of_tokens_is_an_error():
    with pytest.raises(ValueError, match="The teacher 'a' said something about 2 tokens, but its rows have 3"):
        JoinedLogits({"teacher 'a'": (PLACES["a"], Said(WHOLE[:2]))})
