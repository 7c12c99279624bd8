"""How a teacher's distribution is kept in a few bytes per token.

A next-token distribution is the output head applied to a final hidden state, so the state is kept, as in transform
coding of audio and images. It is rotated into coordinates in which an error of a given size costs about the same KL in
every direction, and rounded there with one step size. Directions that hardly matter round to 0 and cost no space. In
addition, the likeliest tokens may be kept one by one, with the mass of all the others. The rounded state then only
shapes that tail. Much less space is needed for a few tokens drawn from each distribution. They are enough for the
gradient of the forward KL.

The coordinates come from some of the user's own tokens ([`Basis.fit`]). The metric is the Fisher information of the
logits, F = W^T (diag(mean p) - mean(p p^T)) W, and W is the output head. KL(p || p') is about 1/2 dh^T F dh for a
small change dh of the hidden state h.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import read_safetensors, whole_file


__all__ = [
    "PRESETS",
    "Basis",
    "Preset",
    "decode",
    "encode",
    "entropies",
    "num_tokens",
    "payload_columns",
    "tail_masses",
]

_GROUPS = 8  # columns of coefficients that are compressed apart: their sizes differ by orders of magnitude
_VALUE_LEVELS, _VALUE_RANGE = 63, 20.0  # log-probabilities of single tokens: linear in sqrt(-log p)
_TAIL_RANGE = 16.0  # log-odds of the tail, from minus to plus this
_MAX_COEFFICIENT = 32767
_TENSORS = ("mean", "analysis", "head", "scale", "offset")


@dataclass(frozen=True)
class Preset:
    """
    What is kept of a distribution.

    Args:
        step (`float`): Rounding step of the coefficients. The KL grows with its square.
        rank (`int`, *optional*): Number of coefficients. `None` for the hidden size.
        top_k (`int`): How many of the likeliest tokens are kept one by one, at most. Up to 255.
        nucleus (`float`): Fewer tokens are kept if they already hold this probability.
        draws (`int`): If above 0, keep only this number of tokens drawn from the distribution. Up to 255. They give an
            unbiased gradient of the forward KL, and of no other divergence (Sparse Logit Sampling, arXiv 2503.16870).
    """

    step: float = 1.0
    rank: int | None = None
    top_k: int = 0
    nucleus: float = 0.99
    draws: int = 0


PRESETS = {
    "tiny": Preset(draws=50),
    "standard": Preset(step=0.15, rank=192, top_k=24),
    "faithful": Preset(step=0.1, top_k=16),
    "exact": Preset(step=0.01),
}


@dataclass
class Basis:
    """
    The coordinates in which hidden states are rounded, and the map from them back to logits.

    Args:
        mean (`Tensor` of shape `(hidden,)`): Mean hidden state.
        analysis (`Tensor` of shape `(hidden, rank)`): `(h - mean) @ analysis` are the coefficients.
        head (`Tensor` of shape `(rank, vocab)`): `(coefficients * scale) @ head + offset` are the logits. In float16,
            at most 1 in size.
        scale (`Tensor` of shape `(rank,)`): The divisors of the rows of `head`.
        offset (`Tensor` of shape `(vocab,)`): The logits of the mean state.
        softcap (`float`, *optional*): The final logits are `softcap * tanh(logits / softcap)` (Gemma 2). 0 for none.
    """

    mean: Tensor
    analysis: Tensor
    head: Tensor
    scale: Tensor
    offset: Tensor
    softcap: float = 0.0

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        rank: int | None = None,
    ) -> "Basis":
        """Fit coordinates to some hidden states.

        Args:
            hidden (`Tensor` of shape `(num_tokens, hidden)`): A few thousand inputs of the output head.
            weight (`Tensor` of shape `(vocab, hidden)`): The output head, cut to the ids that stand for tokens.
            bias (`Tensor` of shape `(vocab,)`, *optional*): Its bias.
            logit_scale (`float`): Logits are multiplied by it (Cohere, Granite).
            rank (`int`, *optional*): Number of coordinates to keep, those that matter most. `None` keeps all.
        """
        weight = weight.float() * logit_scale
        hidden = hidden.to(weight.device).float()
        bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias.float() * logit_scale
        mean_probs = torch.zeros(len(weight), device=weight.device)
        outer = torch.zeros(weight.size(1), weight.size(1), device=weight.device)
        for chunk in hidden.split(256):
            probs = (chunk @ weight.T + bias).softmax(dim=-1)
            mean_probs += probs.sum(dim=0) / len(hidden)
            expected = probs @ weight  # (chunk, hidden)
            outer += expected.T @ expected / len(hidden)
        fisher = ((weight.T * mean_probs) @ weight - outer).double().cpu()
        values, vectors = torch.linalg.eigh((fisher + fisher.T) / 2)
        values = values.clamp(min=float(values.max()) * 1e-7)
        root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
        mean = hidden.mean(dim=0)
        spread = (hidden - mean).double().cpu() @ root
        _, rotation = torch.linalg.eigh(spread.T @ spread / len(hidden))
        rotation = rotation.flip(1)[:, :rank]  # largest first
        synthesis = (rotation.T @ inverse).float().to(weight.device)  # (rank, hidden)
        head = synthesis @ weight.T
        size = head.abs().amax(dim=1).clamp(min=1e-20)
        return cls(
            mean=mean,
            analysis=(root @ rotation).float().to(weight.device),
            head=(head / size.unsqueeze(1)).half(),
            scale=size,
            offset=mean @ weight.T + bias,
            softcap=softcap,
        )

    def logits(self, coefficients: Tensor) -> Tensor:
        """Logits `(num_tokens, vocab)` in float32 from coefficients `(num_tokens, rank)`."""
        logits = (coefficients * self.scale) @ self.head.to(coefficients.dtype) + self.offset
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def to(self, device: torch.device | str) -> "Basis":
        return Basis(**{name: getattr(self, name).to(device) for name in _TENSORS}, softcap=self.softcap)

    def save(self, path: str) -> None:
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        with whole_file(path) as temporary:
            save_file({**tensors, "softcap": torch.tensor(self.softcap)}, temporary)

    @classmethod
    def load(cls, path: str, vocab_size: int | None = None) -> "Basis":
        """Read what [`save`] wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for other tensors, a vocabulary other than `vocab_size`, or tensors whose logits would not be
                finite.
        """
        tensors, _ = read_safetensors(path, "Build the cache again.")
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        hidden, rank, vocab = (math.prod(found.get(name, (0, (0,)))[1]) for name in ("mean", "scale", "offset"))
        wanted = {
            "mean": (torch.float32, (hidden,)),
            "analysis": (torch.float32, (hidden, rank)),
            "head": (torch.float16, (rank, vocab)),
            "scale": (torch.float32, (rank,)),
            "offset": (torch.float32, (vocab,)),
            "softcap": (torch.float32, ()),
        }
        if found != wanted or min(hidden, rank, vocab) < 1 or vocab_size not in (None, vocab):
            raise ValueError(
                f"{path} is not the basis of a teacher cache with {vocab_size or 'some'} ids: its tensors do not fit "
                f"together ({found}). Build the cache again."
            )
        basis = cls(**{name: tensors[name] for name in _TENSORS}, softcap=float(tensors["softcap"]))
        largest = basis.scale.double().abs().sum() * 2 * _MAX_COEFFICIENT + basis.offset.double().abs().max()
        is_finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values()) and float(largest) < 1e37
        if not is_finite or basis.head.abs().max() > 1 or not 0 <= basis.softcap < 1e37:
            raise ValueError(
                f"The tensors in {path} are not finite, or too large for finite logits. Build the cache again."
            )
        return basis


@torch.no_grad()
def encode(hidden: Tensor, logits: Tensor, basis: Basis | None, preset: Preset, seed: int = 0) -> dict[str, bytes]:
    """Encode the distributions at the tokens of one row as named strings of bytes.

    Args:
        hidden (`Tensor` of shape `(num_tokens, hidden)`): Inputs of the teacher's output head.
        logits (`Tensor` of shape `(num_tokens, vocab)`): Its outputs.
        basis ([`Basis`], *optional*): Not needed for draws.
        seed (`int`): Seed of the draws.
    """
    if not torch.isfinite(hidden).all() or torch.isnan(logits).any():
        raise ValueError("The teacher's hidden states or logits are not finite at some tokens.")
    if preset.draws:
        return _encode_draws(logits, preset.draws, seed)
    assert basis is not None
    coefficients = ((hidden.float() - basis.mean) @ basis.analysis / preset.step).round()
    coefficients = coefficients.clamp(-_MAX_COEFFICIENT, _MAX_COEFFICIENT).to(torch.int32)
    zigzag = ((coefficients << 1) ^ (coefficients >> 31)).cpu().numpy().astype(np.uint16)
    # Coefficient by coefficient: neighbours are then of one size, and compress well
    columns = {"coefficients_high": _packed(zigzag.T >> 8)}
    for group, part in enumerate(np.array_split(zigzag.T & 255, _GROUPS)):
        columns[f"coefficients_{group}"] = _packed(part)
    if not preset.top_k:
        return columns

    log_probs = logits.float().log_softmax(dim=-1)
    top = log_probs.topk(min(preset.top_k, log_probs.size(-1)), dim=-1)
    mass = top.values.exp().cumsum(dim=-1)
    kept = mass - top.values.exp() < preset.nucleus  # the likeliest token always is
    counts = kept.sum(dim=-1)
    tail = 1 - mass.gather(-1, counts.unsqueeze(-1) - 1).squeeze(-1).double()
    levels = (top.values.neg().clamp(max=_VALUE_RANGE) / _VALUE_RANGE).sqrt() * _VALUE_LEVELS
    # Sorted by id, as differences of sorted ids are small
    ids = torch.where(kept, top.indices, log_probs.size(-1))
    ids, order = ids.sort(dim=-1)
    levels, kept = levels.gather(-1, order), kept.gather(-1, order)
    odds = tail.clamp(1e-7, 1 - 1e-7).logit()
    codes = ((odds + _TAIL_RANGE) / (2 * _TAIL_RANGE) * 255).round().clamp(0, 255)
    single = {"counts": _packed(counts), "tail": _packed(codes), "values": _packed(levels[kept].round())}
    return columns | single | _encode_ids(ids, kept)


def payload_columns(preset: Preset) -> set[str]:
    """The names in the result of [`encode`]."""
    single = {"counts", "values", *(f"gaps_{byte}" for byte in range(3))}
    if preset.draws:
        return {*single, "entropy"}
    coefficients = {"coefficients_high", *(f"coefficients_{group}" for group in range(_GROUPS))}
    return coefficients | ({*single, "tail"} if preset.top_k else set())


def num_tokens(columns: dict[str, bytes], basis: Basis | None) -> int:
    """How many tokens' distributions `columns` hold. Nothing is decoded."""
    return len(columns["counts"]) if basis is None else len(columns["coefficients_high"]) // basis.analysis.size(1)


def _packed(values: Tensor | np.ndarray) -> bytes:
    """The entries as one byte each."""
    values = values.cpu().numpy() if isinstance(values, Tensor) else values
    return np.ascontiguousarray(values.astype(np.uint8)).tobytes()


def _unpacked(columns: dict[str, bytes], name: str, device: torch.device | str) -> Tensor:
    """The entries of [`_packed`] as integers."""
    return torch.from_numpy(np.frombuffer(columns[name], dtype=np.uint8).astype(np.int64)).to(device)


def _encode_ids(ids: Tensor, kept: Tensor) -> dict[str, bytes]:
    """Sorted ids as differences, with a string for each of their three bytes."""
    gaps = ids.diff(dim=-1, prepend=torch.zeros_like(ids[:, :1]))[kept]
    return {f"gaps_{byte}": _packed((gaps >> (8 * byte)) & 255) for byte in range(3)}


def _decode_ids(
    columns: dict[str, bytes], vocab_size: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, values and which of them are kept, each `(num_tokens, width)`. The other ids repeat the row's first."""
    counts, values = _unpacked(columns, "counts", device), _unpacked(columns, "values", device)
    planes = [_unpacked(columns, f"gaps_{byte}", device) for byte in range(3)]
    if {len(values), *map(len, planes)} != {int(counts.sum())} or (counts < 1).any():
        raise ValueError("A row's tokens are damaged: their lengths do not fit together.")
    width = max(counts.tolist(), default=1)
    kept = torch.arange(width, device=device) < counts.unsqueeze(-1)
    ids, levels = (torch.zeros(kept.shape, dtype=torch.long, device=device) for _ in range(2))
    ids[kept] = planes[0] | (planes[1] << 8) | (planes[2] << 16)
    levels[kept] = values
    if (ids[:, 1:][kept[:, 1:]] == 0).any():
        raise ValueError("A row's tokens are damaged: an id is there twice.")
    ids = ids.cumsum(dim=-1)
    if (ids[kept] >= vocab_size).any():
        raise ValueError("A row's tokens are damaged: an id is beyond the vocabulary.")
    return torch.where(kept, ids, ids[:, :1]), levels, kept


def _encode_draws(logits: Tensor, draws: int, seed: int) -> dict[str, bytes]:
    log_probs = logits.float().log_softmax(dim=-1)
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    drawn = log_probs.exp().multinomial(draws, replacement=True, generator=generator).sort(dim=-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    times = (drawn.unsqueeze(-1) == drawn.unsqueeze(-2)).sum(dim=-1)[first]
    ids, order = torch.where(first, drawn, log_probs.size(-1)).sort(dim=-1)
    entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
    return {
        "counts": _packed(first.sum(dim=-1)),
        "values": _packed(times),
        "entropy": entropy.cpu().numpy().astype(np.float16).tobytes(),
        **_encode_ids(ids, first.gather(-1, order)),
    }


def _decode_draws(columns: dict[str, bytes], vocab_size: int, device: torch.device | str) -> Tensor:
    ids, times, kept = _decode_ids(columns, vocab_size, device)
    if (times[kept] < 1).any():
        raise ValueError("A row's tokens are damaged: one was drawn 0 times.")
    shares = times / times.sum(dim=-1, keepdim=True)
    # What was not drawn has no probability; a finite logarithm keeps 0 times it at 0
    dense = torch.full((len(ids), vocab_size), -1e4, device=device)
    values = shares.log()
    return dense.scatter(-1, ids, torch.where(kept, values, values[:, :1]))


def entropies(columns: dict[str, bytes]) -> Tensor:
    """Entropies of the distributions that were drawn from, `(num_tokens,)` in nats. The draws' own are too small."""
    values = torch.from_numpy(np.frombuffer(columns["entropy"], dtype=np.float16).astype(np.float32))
    if len(values) != len(columns["counts"]) or not (values.isfinite() & (values >= 0)).all():
        raise ValueError("A row's entropies are damaged: there must be a finite one of at least 0 for each token.")
    return values


@torch.no_grad()
def decode(
    columns: dict[str, bytes], basis: Basis | None, preset: Preset, vocab_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Decode the result of [`encode`] to log-probabilities `(num_tokens, vocab)` in float32.

    They are on the device of the basis, or on `device` for draws.

    Raises:
        ValueError: if the lengths of the strings do not fit together.
    """
    if preset.draws:
        return _decode_draws(columns, vocab_size, device)
    assert basis is not None
    device, rank = basis.offset.device, basis.analysis.size(1)
    high = np.frombuffer(columns["coefficients_high"], dtype=np.uint8).reshape(rank, -1)
    widths = [len(part) for part in np.array_split(np.empty(rank), _GROUPS)]
    groups = [np.frombuffer(columns[f"coefficients_{group}"], dtype=np.uint8) for group in range(_GROUPS)]
    low = np.concatenate([part.reshape(width, high.shape[1]) for part, width in zip(groups, widths, strict=True)])
    zigzag = (high.astype(np.int32) << 8) | low
    coefficients = torch.from_numpy((zigzag >> 1) ^ -(zigzag & 1)).T.to(device)  # (num_tokens, rank)
    log_probs = basis.logits(coefficients.float() * preset.step).log_softmax(dim=-1)
    if not preset.top_k:
        return log_probs

    ids, levels, kept = _decode_ids(columns, log_probs.size(-1), device)
    odds = _tail_odds(columns).to(device).unsqueeze(-1)
    if not len(log_probs) == len(ids) == len(odds):
        raise ValueError("A row's likeliest tokens are damaged: their lengths do not fit together.")
    values = -_VALUE_RANGE * (levels.float() / _VALUE_LEVELS) ** 2
    # Single tokens share what the tail leaves; the tail has the shape of the rounded state, without those tokens
    values = values.masked_fill(~kept, -torch.inf).log_softmax(dim=-1) + torch.nn.functional.logsigmoid(-odds)
    covered = (log_probs.gather(-1, ids).exp() * kept).sum(dim=-1, keepdim=True)
    log_probs = log_probs + torch.nn.functional.logsigmoid(odds) - torch.log1p(-covered.clamp(max=1 - 1e-6))
    values = torch.where(kept, values, values[:, :1])  # what fills up a row says the same as its first entry
    return log_probs.scatter(-1, ids, values)


def _tail_odds(columns: dict[str, bytes]) -> Tensor:
    codes = torch.from_numpy(np.frombuffer(columns["tail"], dtype=np.uint8).astype(np.float32))
    return codes / 255 * 2 * _TAIL_RANGE - _TAIL_RANGE


def tail_masses(columns: dict[str, bytes]) -> Tensor:
    """The total probability of tokens that were not kept one by one, `(num_tokens,)`."""
    return _tail_odds(columns).sigmoid()
