"""A contrastive loss for transformers' `ClapModel`.

    outputs = model(input_ids=..., input_features=...)
    loss = clap_loss(outputs, model.logit_scale_a.exp(), radius=0.5)

A radius that the Trainer is to train hangs on the model: `attach_radius(model, StaticRadius(1.0))`
before the Trainer is made (examples/transformers_trainer.py).

`ClapModel(return_loss=True)` adds up two cross entropies that are the same direction, texts against
audios, with the two scales (the second one's logits are transposed; transformers 5.24). Here it is
the symmetric loss of CLAP: texts against audios and audios against texts, averaged.
"""

from typing import Any

from torch import Tensor, nn

from ..checks import check_embeddings
from ..groups import looked_up
from ..loss import fused_svr_loss
from ..radius import radius_of
from .contrast import number


def clap_loss(outputs: Any, logit_scale: float | Tensor, **options: Any) -> Any:
    """
    Args:
        outputs: a ClapOutput, or anything with `audio_embeds` and `text_embeds`, (N, D) each.
        logit_scale: exponentiated.
        **options: of `fused_svr_loss`: radius (a module such as StaticRadius() as well), bilateral,
            group, return_stats, ... Support vectors' terms are averaged over directions like the
            others.

    Returns:
        The loss; with return_stats=True (loss, SVRStats).
    """
    rows, scale = (outputs.audio_embeds, outputs.text_embeds), number(logit_scale)
    radius = options.get("radius")
    if isinstance(radius, nn.Module):
        check_embeddings(*rows)
        normalize, group = bool(options.get("normalize")), looked_up(options.get("group"))
        options["radius"] = radius_of(radius, *rows, scale, normalize, group)
    result = fused_svr_loss(*rows, logit_scale=scale, **options)
    share = 0.5 if options.get("objective", "infonce") == "infonce" else 1.0
    if options.get("return_stats"):
        return share * result[0], result[1]
    return share * result
