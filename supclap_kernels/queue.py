"""Past embeddings as further negatives (MoCo, arXiv 1911.05722)."""

from typing import Any

import torch
from torch import Tensor, nn

from .negatives import Negatives

ROWS = ("audio", "text", "ids")


class Queue(nn.Module):
    """The embeddings of the last `size` pairs, first in, first out, without gradient.

        queue = Queue(8192)
        loss = criterion(audio, text, logit_scale, ids=ids, negatives=queue.negatives())
        queue.push(audio, text, ids)

    Its state is saved with the module it is part of. With a group every rank has a queue of its
    own, whose rows are everybody's negatives: keep it outside of what DistributedDataParallel
    wraps, which would give all ranks the first one's. While the encoders learn quickly, what is
    `size` pairs old is of another model: a short queue is the safer one.

    Args:
        size: of each tower, at most.
    """

    audio: Tensor
    text: Tensor
    ids: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a positive number of pairs, got {size!r}")
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        for name in ROWS:
            dtype = torch.int64 if name == "ids" else torch.float32
            self.register_buffer(name, torch.empty(0, dtype=dtype))

    def extra_repr(self) -> str:
        return f"size={self.size}, filled={len(self)}"

    def __len__(self) -> int:
        return len(self.audio)

    def negatives(self) -> Negatives | None:
        """The pairs so far, as `fused_svr_loss` takes them; None if there are none."""
        if not len(self):
            return None
        ids = self.ids if len(self.ids) else None
        return Negatives(self.audio, self.text, ids, ids)

    @torch.no_grad()
    def push(self, audio: Tensor, text: Tensor, ids: Tensor | None = None) -> None:
        """Adds a batch, (N, D) each, after the loss that it is no negative of; `ids` (N,) int64,
        always or never. What becomes too much is forgotten, the oldest first."""
        if audio.ndim != 2 or audio.shape != text.shape:
            raise ValueError(
                f"audio and text must both be (N, D), got {tuple(audio.shape)} and "
                f"{tuple(text.shape)}"
            )
        if len(self) and (ids is None) == bool(len(self.ids)):
            raise ValueError("ids must come with every batch of a queue, or with none")
        if audio.dtype != text.dtype or (len(self) and audio.shape[1:] != self.audio.shape[1:]):
            raise ValueError(
                f"a queue has one dtype and one width: got {audio.dtype} and {text.dtype}, "
                f"{audio.shape[1]} columns beside {tuple(self.audio.shape)}"
            )
        if ids is not None and (ids.dtype != torch.int64 or ids.shape != audio.shape[:1]):
            raise ValueError(
                f"ids must be int64 of shape ({len(audio)},), got {ids.dtype} {tuple(ids.shape)}"
            )
        for name, new in zip(ROWS, (audio, text, ids), strict=True):
            if new is None:
                continue
            old, new = getattr(self, name), new.detach()[-self.size :]
            left = max(0, min(len(old), self.size - len(new)))
            kept = old[len(old) - left :]
            setattr(self, name, torch.cat((kept.to(new), new)) if left else new.clone())

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """A queue is as long as what it is loaded from, but for its oldest rows."""
        for name in ROWS:
            saved = state.get(prefix + name)
            if saved is not None:
                saved = state[prefix + name] = saved[-self.size :]
                like = getattr(self, name)
                setattr(self, name, torch.empty_like(saved, device=like.device))
        super()._load_from_state_dict(state, prefix, *arguments)
