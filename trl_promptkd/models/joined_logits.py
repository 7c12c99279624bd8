"""What several teachers say at the tokens of one batch, each at its own, as if one of them said it."""

from bisect import bisect_left
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .forward import TokenLogits


__all__ = ["JoinedLogits"]


class JoinedLogits:
    """
    What several models say at the tokens of one batch. It follows [`TokenLogits`].

    Args:
        parts (`Mapping`): Of each model, by what it is called in messages: the places of its tokens in the batch, in
            rising order, and what it says at them. The widths of their logits are the same.

    Raises:
        ValueError: if a model says something about more or fewer tokens than there are places.
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
        """Of what was drawn from, `(num_tokens,)` in nats: NaN at tokens of models that draw nothing, and `None` if
        none of them does."""
        known = [(places, said.entropies()) for places, said in self.parts.values()]
        drawn = [(places, entropies) for places, entropies in known if entropies is not None]
        if not drawn:
            return None
        whole = torch.full((len(self),), torch.nan, device=drawn[0][1].device)
        for places, entropies in drawn:
            whole[places] = entropies
        return whole
