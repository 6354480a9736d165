"""Hard negatives as other trainers bring them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_integrations import Columns, N, columns, features, same

import supclap_kernels as sk
from supclap_kernels.integrations import laion_clap, open_clip, sentence_transformers, transformers
from supclap_kernels.negatives import split_hard_negatives


@pytest.mark.parametrize("count", [3, 5])
def test_hard_negatives_of_sentence_transformers(count):
    """Triplets and longer, against the library's own classes of today and of before."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model, given = Columns(), columns(count)
    ours = sentence_transformers.MultipleNegativesSymmetricRankingLoss(model, scale=15.0)
    both = {
        "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction",
    }  # fmt: skip
    for theirs in (
        losses.MultipleNegativesSymmetricRankingLoss(model, scale=15.0),
        losses.MultipleNegativesRankingLoss(model, scale=15.0, **both),
    ):
        wanted = theirs(given, torch.zeros(0))
        assert same(ours(given), wanted, list(model.parameters()))
        assert abs((ours(given) - wanted).item()) < 1e-6
    pairs = ours(given[:2])
    assert ours(given) > pairs


def test_hard_negatives_of_gradcache():
    """Its rows, and what its loss makes of them in the direction that it has."""
    h, (anchors,) = 2, features(1)
    passages = F.normalize(torch.randn(N * (1 + h), anchors.shape[1]), dim=1).requires_grad_()
    text, negatives = split_hard_negatives(passages, N)
    loss = sk.fused_svr_loss(anchors, text, None, 9.0, negatives=negatives)
    target = torch.arange(0, N * (1 + h), 1 + h)
    wanted = F.cross_entropy(9.0 * anchors @ passages.T, target)
    wanted = wanted + F.cross_entropy(9.0 * passages[target] @ anchors.T, torch.arange(N))
    assert same(loss, wanted, [passages, anchors])
    assert split_hard_negatives(passages[:N], N)[1] is None
    with pytest.raises(ValueError, match="no multiple"):
        split_hard_negatives(passages[:-1], N)


def test_further_negatives_of_the_other_trainers():
    torch.manual_seed(0)
    a, t, x, y = (F.normalize(torch.randn(N, 8), dim=1).requires_grad_() for _ in range(4))
    negatives, leaves = sk.Negatives(audio=x, text=y), [a, t, x, y]
    assert sk.Negatives(a, t, x, y).turned() == (t, a, y, x)
    outputs = SimpleNamespace(audio_embeds=a, text_embeds=t)
    for found in (
        open_clip.ClipLoss()(a, t, 9.0, negatives=negatives),
        laion_clap.ClipLoss()(a, t, 9.0, negatives=negatives),
        transformers.clap_loss(outputs, 9.0, negatives=negatives),
    ):
        wanted = sk.fused_svr_loss(a, t, None, 9.0, negatives=negatives) / 2
        assert same(found, wanted, leaves)
    b = torch.tensor(-3.0)
    options = {"objective": "siglip", "negatives": negatives}
    criterion = open_clip.SigLipLoss()
    for criterion.by_image in (False, True):  # True: with several ranks
        wanted = sk.fused_svr_loss(a, t, None, 9.0, b, **options)
        assert same(criterion(a, t, 9.0, b, negatives=negatives), wanted, leaves)
    with pytest.raises(ValueError, match="negatives need mlp_loss=False"):
        laion_clap.ClipLoss(mlp_loss=True)(a, t, 9.0, 9.0, a, t, negatives=negatives)
