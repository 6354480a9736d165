"""`laion_clap.clap_module.loss.ClipLoss` in its call (laion_clap 1.1.7).

    from supclap_kernels.integrations.laion_clap import ClipLoss
    loss = ClipLoss(..., radius=sk.attach_radius(model, sk.StaticRadius(1.0)), beta=1.0)

Its trainer builds the loss anew each epoch, and optimises the model alone: `attach_radius` gives
the same radius each time; the first time before DDP and the optimizer.

Gather modes: see open_clip.py; gradients are the true ones here, too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import autocast_off, without_autocast
from ..collectives import over_group
from ..negatives import Negatives
from ..reference import accumulator_dtype, infonce_rows, kept_pairs
from .contrast import Contrast, number


class ClipLoss(nn.Module):
    """The average of both directions' cross entropies; with mlp_loss those of audio with text_mlp
    (by logit_scale_a) and of audio_mlp with text (by logit_scale_t).

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: laion_clap's.
        mlp_loss: four cross entropies instead of two.
        weight_loss_kappa: if not 0, rows are weighted by exp(mean similarity to the batch / kappa),
            those of the audios in the first pair and of the texts in the second. With mlp_loss in
            one process; without it over several ranks, where audios are weighted by their texts and
            texts by their audios: then without a radius, in O(N^2) memory as the original. It fails
            in the other two cases.
        radius: a module such as StaticRadius(), or None; one radius for both pairs.
        **options: of `SVRLoss`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        mlp_loss: bool = False,
        weight_loss_kappa: float = 0,
        *,
        radius: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if weight_loss_kappa and world_size == 1 and not mlp_loss:
            raise ValueError(
                "weight_loss_kappa in one process needs mlp_loss=True: laion_clap has no such loss "
                "without it"
            )
        if weight_loss_kappa and world_size > 1 and (mlp_loss or radius is not None):
            raise ValueError(
                "weight_loss_kappa over ranks needs mlp_loss=False, since laion_clap has no such "
                "loss with it, and radius=None; or pass weight_loss_kappa=0"
            )
        self.mlp_loss, self.kappa = mlp_loss, weight_loss_kappa
        self.contrast = Contrast(radius, local_loss, rank, world_size, use_horovod, **options)

    def forward(
        self,
        audio_features: Tensor,
        text_features: Tensor,
        logit_scale_a: float | Tensor,
        logit_scale_t: float | Tensor | None = None,
        audio_features_mlp: Tensor | None = None,
        text_features_mlp: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> Tensor:
        """Features (N, D) of this rank; scales already exponentiated. logit_scale_t and the
        features through the MLPs belong to mlp_loss. negatives: further rows of this rank, without
        mlp_loss and weight_loss_kappa."""
        if negatives is not None and (self.kappa or self.mlp_loss):
            raise ValueError("negatives need mlp_loss=False and weight_loss_kappa=0")
        if self.kappa and not self.mlp_loss:
            return self.weighted_over_ranks(audio_features, text_features, logit_scale_a)
        if not self.mlp_loss:
            rows = (audio_features, text_features)
            return self.contrast(*rows, logit_scale_a, negatives=negatives)
        if logit_scale_t is None or audio_features_mlp is None or text_features_mlp is None:
            raise ValueError(
                "mlp_loss=True needs logit_scale_t, audio_features_mlp and text_features_mlp"
            )
        first = self.pair(audio_features, text_features_mlp, logit_scale_a, audio_features)
        second = self.pair(audio_features_mlp, text_features, logit_scale_t, text_features)
        return 0.5 * (first + second)

    def pair(self, audio: Tensor, text: Tensor, scale: float | Tensor, weighing: Tensor) -> Tensor:
        if not self.kappa:
            return self.contrast(audio, text, scale)
        with autocast_off(weighing):
            weight = likeness(weighing.detach().float(), self.kappa)
        return self.contrast(audio, text, scale, weight=weight / weight.mean())

    def weighted_over_ranks(self, audio: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
        self.contrast.agree_on_ranks()
        criterion = self.contrast.criterion
        sums = over_group(
            weighted_rows, criterion.group, audio, text, None, number(scale), None, None, None,
            reduction="none" if self.contrast.local else "sum", return_stats=False,
            normalize=criterion.options["normalize"], kappa=float(self.kappa),
        ).sum(dim=0)  # fmt: skip
        return 0.5 * (sums[:2] / sums[2:]).sum()


def likeness(X: Tensor, kappa: float) -> Tensor:
    """(N,): exp(mean similarity of a row to all rows / kappa)."""
    return (X @ X.sum(dim=0) / (kappa * len(X))).exp()


@without_autocast
def weighted_rows(
    audio: Tensor, text: Tensor, radius: None, scale: float | Tensor, bias: None, *,
    kappa: float, normalize: bool, **_: Any,
) -> Tensor:  # fmt: skip
    """(N, 4): weighted cross entropies of the audios and of the texts, and both weights."""
    dtype = accumulator_dtype(audio.dtype)
    A, T = audio.to(dtype), text.to(dtype)
    by_text, by_audio = likeness(T.detach(), kappa), likeness(A.detach(), kappa)
    if normalize:
        A, T = F.normalize(A, dim=1), F.normalize(T, dim=1)
    logits, keep = scale * A @ T.t(), kept_pairs(len(A), None, A.device)
    of_audios, of_texts = infonce_rows(logits, keep), infonce_rows(logits.t(), keep)
    return torch.stack((by_text * of_audios, by_audio * of_texts, by_text, by_audio), dim=1)
