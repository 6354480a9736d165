"""The semantic radius R: one learnable number (StaticSVR), or a small network (DynamicSVR)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .autocast import autocast_off
from .groups import looked_up
from .reference import accumulator_dtype, gap_and_direction
from .watch import watch

TOP_NEGATIVES = 16
CHUNK_BYTES = 64 * 2**20
"""Similarities of one chunk of rows; above it they are recomputed in backward instead of kept."""


BOUNDS = ("none", "gap")


def unbounded(init: float, bound: str) -> float:
    """What a module's output starts at, so that its radius starts at `init`."""
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {BOUNDS}, got {bound!r}")
    if bound == "none":
        return float(init)
    if not 0 < init < 1:
        raise ValueError(f"with bound='gap', init is R / r and lies between 0 and 1, got {init}")
    return math.log(init / (1 - init))


def mark(module: nn.Module, bound: str) -> None:
    """A bounded radius has a name more in its checkpoints: without the bound its numbers mean
    something else, and neither kind loads the other's."""
    if bound == "gap":
        module.register_buffer("bounded", torch.ones(1))


def below_the_gap(x: Tensor, audio: Tensor, text: Tensor) -> Tensor:
    """R_i = r_i sigmoid(x_i), (N,); the gap r_i (N,) of audio, text (N, D) is a constant here, so
    the push keeps the form that the paper derives."""
    with autocast_off(audio):
        dtype = accumulator_dtype(audio.dtype)
        r, _ = gap_and_direction(text.detach().to(dtype), audio.detach().to(dtype))
    return r * x.sigmoid()


class StaticRadius(nn.Module):
    """StaticSVR: the same learnable radius for every pair.

    The parameter has shape (1,), since one without dimensions cannot be sharded; what is handed out
    is 0-d. Checkpoints of either shape load.

    Args:
        init: initial radius; the paper gives none. `supclap reproduce` chose 1.0, with the weight
            beta = 1 of the constraint, and the trainer begins so.
        bound: "none", or "gap": R_i = r_i sigmoid(x), the same learnable share of each pair's gap
            r_i = |a_i - t_i|, which starts at `init`. Handed out is (N,) then.
    """

    def __init__(self, init: float = 0.1, bound: str = "none") -> None:
        super().__init__()
        self.init, self.bound = unbounded(init, bound), bound
        self.radius = nn.Parameter(torch.full((1,), self.init))
        mark(self, bound)

    def reset_parameters(self) -> None:
        """Back to the initial radius."""
        nn.init.constant_(self.radius, self.init)

    def extra_repr(self) -> str:
        return f"bound={self.bound!r}"

    def forward(self, audio: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
        """The parameter, 0-d; with a bound R (N,) for audio, text (N, D)."""
        if self.training:
            watch(self.radius)
        R = self.radius.view(())
        if self.bound == "gap":
            return below_the_gap(R, audio, text)
        # Where `fully_shard` shards this module by itself, it makes it one of a class of its own,
        # and takes the parameter's memory back after forward.
        return R if type(self) is StaticRadius else R.clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        stored = state_dict.get(prefix + "radius")
        if isinstance(stored, Tensor) and stored.ndim == 0:
            state_dict[prefix + "radius"] = stored.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class LastLayer(nn.Linear):
    """Starts at one value, whatever comes in."""

    def __init__(self, width: int, start: float) -> None:
        self.start = start  # what is built next resets itself
        super().__init__(width, 1)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.start)


class DynamicRadius(nn.Module):
    """DynamicSVR: a 3-layer MLP from a pair's scaled similarities to its radius.

    With s_ij = logit_scale <t_i, a_j>, row i gives the network

    - `features="similarities"` (the paper): [s_ii, s_i1, ..., s_iN without s_ii], the positive
      first, then the negatives in batch order; tied to `batch_size`;
    - `features="summary"` (any batch size): the positive, the 16 largest negatives in descending
      order (0 where there are fewer), and mean, standard deviation and log-sum-exp of the
      negatives.

    The last layer starts at zero with bias `init`, so every radius starts there. Large batches are
    worked through in chunks of rows and recomputed in backward: nothing (N, N) is kept.

    Args:
        batch_size: N of every batch, of all ranks together with a process group; needed for
            "similarities" only.
        init: initial radius; see StaticRadius.
        hidden: widths of the two hidden layers (GELU).
        detach_similarity: no gradient through the similarities into the embeddings.
        bound: "none", or "gap": R_i = r_i sigmoid(x_i) of the network's output x_i, always between
            0 and the pair's gap r_i = |a_i - t_i|; `init` is R / r then.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        init: float = 0.1,
        hidden: tuple[int, int] = (256, 64),
        features: str = "similarities",
        detach_similarity: bool = False,
        bound: str = "none",
    ) -> None:
        super().__init__()
        if features not in ("similarities", "summary"):
            raise ValueError(f"features must be 'similarities' or 'summary', got {features!r}")
        if features == "similarities" and (batch_size is None or batch_size < 1):
            raise ValueError(
                f"features='similarities' needs the batch size, got batch_size={batch_size!r}; "
                "features='summary' works at any"
            )
        self.batch_size, self.features = batch_size, features
        self.detach_similarity, self.bound = detach_similarity, bound
        width = batch_size if features == "similarities" else TOP_NEGATIVES + 4
        assert width is not None
        first, last = nn.Linear(width, hidden[0]), LastLayer(hidden[1], unbounded(init, bound))
        middle = nn.Linear(hidden[0], hidden[1])
        self.network = nn.Sequential(first, nn.GELU(), middle, nn.GELU(), last)
        mark(self, bound)

    def reset_parameters(self) -> None:
        """Random weights as of a new module, and every radius at the initial one."""
        for layer in (0, 4, 2):  # in the order in which they are built
            self.network[layer].reset_parameters()  # type: ignore[operator]

    def extra_repr(self) -> str:
        return (
            f"features={self.features!r}, batch_size={self.batch_size}, "
            f"detach_similarity={self.detach_similarity}, bound={self.bound!r}"
        )

    def rows(self, text: Tensor, audio: Tensor, scale: Tensor, first: int) -> Tensor:
        """Radius (n,) of rows first .. first + n of the batch: text (n, D) against audio (N, D).

        Under autocast the network alone is lowered, as any network is.
        """
        with autocast_off(text):
            s = self.features_of(text, audio, scale, first)
        return self.network(s.to(next(self.network.parameters()).dtype))[:, 0]

    def features_of(self, text: Tensor, audio: Tensor, scale: Tensor, first: int) -> Tensor:
        """(n, width): what the network sees of each row."""
        s = scale * text @ audio.t()
        n, N = s.shape
        row = torch.arange(first, first + n, device=s.device)[:, None]
        column = torch.arange(N, device=s.device)[None, :]
        # Column 0 takes the positive, the columns after it the negatives in order: those before the
        # positive move up.
        order = torch.where(column == 0, row, torch.where(column <= row, column - 1, column))
        s = s.gather(1, order)
        return summary(s) if self.features == "summary" else s

    def forward(
        self, audio: Tensor, text: Tensor, logit_scale: float | Tensor, group: Any = None
    ) -> Tensor:
        """R (N,) for audio, text (N, D); with a process group the negatives are every rank's."""
        if self.training:
            watch(next(self.network.parameters()))
        x = self.outputs(audio, text, logit_scale, group)
        return below_the_gap(x, audio, text) if self.bound == "gap" else x

    def outputs(
        self, audio: Tensor, text: Tensor, logit_scale: float | Tensor, group: Any
    ) -> Tensor:
        """(N,): what the network says of each row."""
        scale = torch.as_tensor(logit_scale, dtype=text.dtype, device=text.device)
        if self.detach_similarity:
            audio, text, scale = audio.detach(), text.detach(), scale.detach()
        first, group = 0, looked_up(group)
        if group is not None and group.size() > 1:
            from .collectives import whole_batch

            sizes, (audio, scale) = whole_batch(group, len(text), audio, scale)
            first = sum(sizes[: group.rank()])
        n, N = len(text), len(audio)
        if self.features == "similarities" and N != self.batch_size:
            raise ValueError(
                f"this DynamicRadius was built for batches of {self.batch_size} pairs, got {N}; "
                "keep the batch size fixed (drop the last batch) or use features='summary'"
            )
        if n * N * text.element_size() <= CHUNK_BYTES:
            return self.rows(text, audio, scale, first)
        size = max(1, CHUNK_BYTES // (N * text.element_size()))
        parts = [
            checkpoint(self.rows, text[i : i + size], audio, scale, first + i, use_reentrant=False)
            for i in range(0, n, size)
        ]
        return torch.cat(parts)


def radius_of(
    module: nn.Module,
    audio: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    normalize: bool,
    group: Any,
) -> Tensor:
    """What a radius module says of these rows, normalised if the loss normalises them."""
    rows = (audio, text)
    if normalize and not (isinstance(module, StaticRadius) and module.bound == "none"):
        with autocast_off(audio):
            rows = (F.normalize(audio, dim=1), F.normalize(text, dim=1))
    shared = isinstance(module, DynamicRadius) and group is not None
    over = {"group": group} if shared else {}
    radius: Tensor = module(*rows, logit_scale, **over)
    return radius


def summary(s: Tensor) -> Tensor:
    """(n, 20) from rows [positive, negatives]: see DynamicRadius."""
    positive, negatives = s[:, :1], s[:, 1:]
    count = negatives.shape[1]
    if count == 0:
        return F.pad(positive, (0, TOP_NEGATIVES + 3))
    top = negatives.topk(min(TOP_NEGATIVES, count), dim=1).values
    top = F.pad(top, (0, TOP_NEGATIVES - top.shape[1]))
    mean = negatives.mean(dim=1, keepdim=True)
    # The small constant keeps the root's gradient finite where all negatives are equal.
    spread = ((negatives - mean).square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    return torch.cat((positive, top, mean, spread, negatives.logsumexp(dim=1, keepdim=True)), dim=1)


class SavedRadius(nn.Module):
    """A radius that was read from a file: its tensors, by their names. `attach_radius` gives them
    to the radius that takes its place."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            *parents, last = name.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.register_parameter(last, nn.Parameter(value))
