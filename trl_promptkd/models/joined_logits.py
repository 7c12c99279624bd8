"""The output of several teachers, each at its own tokens of one batch, joined as if it came from one teacher."""

from bisect import bisect_left
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .forward import TokenLogits


__all__ = ["JoinedLogits"]


class JoinedLogits:
    """
    The output of several models at the tokens of one batch. It follows [`TokenLogits`].

    Args:
        parts (`Mapping`): From each model's name in messages to the places of its tokens in the batch, in rising
            order, and its output at them. The logits of all models have the same width.

    Raises:
        ValueError: if a model's output is for more or fewer tokens than there are places.
    """

    def __init__(self, parts: Mapping[str, tuple[Int[Tensor, "own"], TokenLogits]]):
        self.parts = parts
        self._places = {name: places.tolist() for name, (places, _) in parts.items()}
        for name, (places, said) in parts.items():
            if len(said) != len(places):
                raise ValueError(
                    f"The {name} said something about {len(said)} tokens, but its rows have {len(places)}."
                )

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def logits(self, start: int, end: int) -> Float[Tensor, "tokens vocab"]:
        """Logits or log-probabilities `(end - start, vocab)` of some tokens, in float32."""
        found, at = [], []
        for name, (places, said) in self.parts.items():
            first, after = (bisect_left(self._places[name], token) for token in (start, end))
            found.append(said.logits(first, after))
            at.append(places[first:after])
        return torch.cat(found)[torch.cat(at).argsort()]

    def entropies(self) -> Float[Tensor, "tokens"] | None:
        """Entropies `(num_tokens,)`, in nats, of the distributions drawn from. NaN at tokens of models whose logits
        are not those of draws. `None` if no model's are."""
        known = [(places, said.entropies()) for places, said in self.parts.values()]
        drawn = [(places, entropies) for places, entropies in known if entropies is not None]
        if not drawn:
            return None
        whole = torch.full((len(self),), torch.nan, device=drawn[0][1].device)
        for places, entropies in drawn:
            whole[places] = entropies
        return whole
