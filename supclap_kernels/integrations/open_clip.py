"""`open_clip.ClipLoss` and `open_clip.SigLipLoss` in their calls (open_clip 3.3 and 4.0).

    from supclap_kernels.integrations.open_clip import ClipLoss
    radius = sk.attach_radius(model, sk.StaticRadius(1.0))  # before DDP and the optimizer
    loss = ClipLoss(radius=radius, beta=1.0)                # instead of open_clip.ClipLoss()

The image's place is the audio's. Values are open_clip's for every `local_loss` and
`gather_with_grad`. Gradients are always the true ones of the loss over all ranks' rows, once they
are averaged over ranks as DistributedDataParallel does: what open_clip has with gather_with_grad.
Without it open_clip's are not: with local_loss=False those of the features are 1 / world_size of
the true ones (that of the scale is right); with local_loss=True what a row gets as other ranks'
negative is missing.
"""

from typing import Any

from torch import Tensor, nn

from ..negatives import Negatives
from .contrast import Contrast


class ClipLoss(nn.Module):
    """The average of both directions' cross entropies; with a radius, and of the support vectors'.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: open_clip's; see above.
            cache_labels changes nothing, there are no labels.
        radius: a module such as StaticRadius(), or None.
        **options: of `SVRLoss`: bilateral, alpha, renormalize, workspace, backend, ...
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        radius: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.contrast = Contrast(radius, local_loss, rank, world_size, use_horovod, **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        negatives: Negatives | None = None,
    ) -> Any:
        """image_features, text_features (N, D) of this rank; logit_scale already exponentiated. A
        softmax does not depend on logit_bias: its gradient is 0. negatives: further rows of this
        rank, whose `audio` are images."""
        loss = self.contrast(image_features, text_features, logit_scale, negatives=negatives)
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """The sigmoid loss, over N; with a radius, and that of the support vectors.

    Several ranks: the value is that of this rank's images with all texts. `dist_impl` says how
    open_clip's ranks exchange rows; here that is `exchange`. `chunk_size` is how many of them it
    compares at a time, which changes its memory only; here that is `workspace`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
        *,
        radius: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 0:
            raise ValueError(f"chunk_size must be a number of rows, 0 or None; got {chunk_size}")
        self.contrast = Contrast(radius, True, rank, world_size, objective="siglip", **options)
        # This rank's images are the rows then; a radius needs the texts there.
        self.by_image = self.contrast.local and radius is None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        negatives: Negatives | None = None,
    ) -> Any:
        rows = (image_features, text_features)
        if self.by_image:
            rows = rows[::-1]
            negatives = negatives and negatives.turned()
        loss = self.contrast(*rows, logit_scale, logit_bias, negatives=negatives)
        return {"contrastive_loss": loss} if output_dict else loss
