"""`laion_clap.clap_module.loss.ClipLoss` in its call (laion_clap 1.1.7).

    from supclap_kernels.integrations.laion_clap import ClipLoss

Gather modes: see open_clip.py; gradients are the true ones here, too.
"""

from typing import Any

from torch import Tensor, nn

from .contrast import Contrast


class ClipLoss(nn.Module):
    """The average of both directions' cross entropies; with mlp_loss those of audio with text_mlp
    (by logit_scale_a) and of audio_mlp with text (by logit_scale_t).

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: laion_clap's.
        mlp_loss: four cross entropies instead of two.
        weight_loss_kappa: if not 0, rows are weighted by exp(mean similarity to the batch / kappa),
            those of the audios in the first pair and of the texts in the second. With mlp_loss and
            one rank only: else the original weighs the two directions of a pair differently, or
            (one rank, no mlp_loss) fails.
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
        if weight_loss_kappa and (not mlp_loss or world_size > 1):
            raise ValueError(
                "weight_loss_kappa needs mlp_loss=True and world_size=1: else the two directions "
                "of a pair of towers would be weighted differently"
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
    ) -> Tensor:
        """Features (N, D) of this rank; scales already exponentiated. logit_scale_t and the
        features through the MLPs belong to mlp_loss."""
        if not self.mlp_loss:
            return self.contrast(audio_features, text_features, logit_scale_a)
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
        X = weighing.detach().float()
        weight = (X @ X.sum(dim=0) / (self.kappa * len(X))).exp()
        return self.contrast(audio, text, scale, weight=weight / weight.mean())
