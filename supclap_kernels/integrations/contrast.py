"""What the adapters share: the loss in the scale of its average over directions, and ranks."""

from typing import Any

from torch import Tensor, nn

from ..collectives import together
from ..groups import WORLD, is_initialized
from ..loss import SVRLoss
from ..negatives import Negatives


class Contrast(nn.Module):
    """`SVRLoss` as CLIP-like trainers count it: InfoNCE's two directions are averaged, not summed,
    and with them the support vectors' term.

    Args:
        radius: a module such as StaticRadius(), or None for the library's own loss.
        local_loss: with several ranks, the value is that of this rank's rows; else everybody's. The
            gradient is that of the loss over all rows either way, once it is averaged over ranks.
        rank, world_size: as the trainer counts; several ranks are the default process group,
            initialised before the first call, or the one given as `group`.
        **options: of `SVRLoss`.
    """

    def __init__(
        self,
        radius: nn.Module | None,
        local_loss: bool,
        rank: int,
        world_size: int,
        use_horovod: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: only torch.distributed process groups are supported")
        self.rank, self.world_size = rank, world_size
        self.local = local_loss and world_size > 1
        if world_size > 1:
            options.setdefault("group", WORLD)
        if "reduction" in options:
            raise TypeError("reduction is the library's own: the mean")
        self.criterion = SVRLoss(radius, reduction="none" if self.local else "mean", **options)
        self.share = 0.5 if self.criterion.options["objective"] == "infonce" else 1.0
        if world_size > 1 and is_initialized():
            self.check_ranks()

    def check_ranks(self) -> None:
        """What the trainer counts is what the process group has."""
        group = self.criterion.group
        counted = (0, 1) if group is None else (group.rank(), group.size())
        if counted != (self.rank, self.world_size):
            raise ValueError(
                f"rank={self.rank}, world_size={self.world_size} do not fit the process group, in "
                f"which this is rank {counted[0]} of {counted[1]}"
            )

    def agree_on_ranks(self) -> None:
        """Raises on every rank where one does not count as the group does."""
        if self.world_size > 1:
            with together(self.criterion.group):
                self.check_ranks()

    def forward(
        self,
        audio: Tensor,
        text: Tensor,
        scale: float | Tensor,
        bias: float | Tensor | None = None,
        weight: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> Tensor:
        self.agree_on_ranks()
        loss = self.criterion(
            audio, text, number(scale), number(bias), weight=weight, negatives=negatives
        )
        return self.share * (loss.mean() if self.local else loss)


def number(x: Any) -> Any:
    """0-d: parameters of one element come in other shapes, too."""
    return x.reshape(()) if isinstance(x, Tensor) and x.ndim else x
