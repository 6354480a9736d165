"""Further negatives: columns of the similarity matrices that have no row of their own."""

import pytest
import torch
import torch.nn.functional as F
from interface_cases import close
from test_reference import ALL, relative

from supclap_kernels import Negatives, svr_loss_reference
from supclap_kernels.gradients import loss_and_gradients
from supclap_kernels.testing import DIFFERENTIABLE, NEGATIVES, Case, evaluate, make_inputs

SIZES = ((5, 9), (1, 0), (0, 7), (64, 1))


def by_hand(inputs, objective, bilateral, k, b, R, alpha):
    """Eager PyTorch with the negatives concatenated, as a user would write it."""
    A, T, N = inputs.audio, inputs.text, len(inputs.audio)
    a = torch.cat([x for x in (A, inputs.audio_negatives) if x is not None])
    t = torch.cat([x for x in (T, inputs.text_negatives) if x is not None])
    u = F.normalize(A - T, dim=1)
    T_sup, A_sup = F.normalize(T + R * u, dim=1), F.normalize(A - R * u, dim=1)
    labels = torch.arange(N)
    if objective == "infonce":
        terms = [(T, a, 1.0), (A, t, 1.0), (T_sup, a, alpha)]
        if bilateral == "mirror":
            terms.append((A_sup, t, alpha))
        if bilateral == "shared":
            terms.append((A, torch.cat((T_sup, t[N:])), alpha))
        return sum(f * F.cross_entropy(k * x @ y.T, labels) for x, y, f in terms)

    def sigmoid_loss(x, y):
        z = 2 * torch.eye(N, len(y), dtype=x.dtype) - 1
        return -F.logsigmoid(z * (k * x @ y.T + b)).sum() / N

    loss = sigmoid_loss(T, a) + alpha * sigmoid_loss(T_sup, a)
    loss = loss - F.logsigmoid(-(k * A @ t[N:].T + b)).sum() / N
    return loss + (alpha * sigmoid_loss(A_sup, t) if bilateral == "mirror" else 0.0)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bilateral", ["none", "mirror", "shared"])
@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_the_reference_is_a_concatenation(objective, bilateral, sizes):
    options = {"objective": objective, "bilateral": bilateral, "alpha": 0.7}
    inputs = make_inputs(
        Case(N=13, D=9, dtype=torch.float64, options=options, negatives=sizes, radius="none")
    )
    b = torch.tensor(-3.0, dtype=torch.float64) if objective == "siglip" else None
    negatives = inputs.negatives({})
    found = svr_loss_reference(inputs.audio, inputs.text, 0.2, 9.0, b, **options, **negatives)
    wanted = by_hand(inputs, objective, bilateral, 9.0, b, 0.2, 0.7)
    assert relative(found, wanted) < 1e-7  # of the gap's smoothing
    without = svr_loss_reference(inputs.audio, inputs.text, 0.2, 9.0, b, **options)
    assert found > without


@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("radius", ["none", "scalar", "row"])
@pytest.mark.parametrize("duplicates", [False, True], ids=["", "ids"])
def test_closed_form(options, radius, duplicates):
    variants = ((False, 0.5, "mean"), (True, 0.5, "none"), (False, 0.1, "sum"), (False, 0.5, "sum"))
    for (normalize, gap, reduction), sizes in zip(variants, SIZES, strict=True):
        options = {**options, "reduction": reduction, "normalize": normalize}
        options = {**options, "alpha": 0.8, "beta": 0.3}
        case = Case(
            N=23, D=11, dtype=torch.float64, gap=gap, radius=radius, duplicates=duplicates,
            weighted=True, options=options, negatives=sizes,
        )  # fmt: skip
        inputs = make_inputs(case)
        wanted = evaluate(svr_loss_reference, inputs, **options)
        arguments = (getattr(inputs, name) for name in DIFFERENTIABLE)
        loss, gradients = loss_and_gradients(
            *arguments, ids=inputs.ids, weight=inputs.weight, upstream=inputs.upstream, **options,
            **inputs.negatives({}),
        )  # fmt: skip
        assert relative(loss, wanted["loss"]) < 1e-12
        for name in inputs.differentiable():
            value = getattr(gradients, name)
            value = value.sum() if radius == "scalar" and name == "radius" else value
            assert relative(value, wanted[name]) < 1e-12, name
        for name, M in zip(NEGATIVES, sizes, strict=True):
            assert (name in wanted) == (M > 0)


def test_statistics_count_them():
    """Of negatives that are all the same row: the mean, and who is beaten."""
    inputs = make_inputs(Case(N=8, D=6, dtype=torch.float64, radius="none"))
    A, T = inputs.audio, inputs.text
    more = Negatives(audio=T[:3].clone(), text=A[5:6].expand(2, -1).clone())
    _, stats = svr_loss_reference(A, T, None, 9.0, negatives=more, return_stats=True)
    S = T @ A.T
    off = ~torch.eye(8, dtype=torch.bool)
    every = torch.cat((S[off], (T @ more.audio.T).flatten(), (A @ more.text.T).flatten()))
    assert close(stats.negative_similarity, every.mean(), 1e-12)
    _, before = svr_loss_reference(A, T, None, 9.0, return_stats=True)
    beaten_text = ((S >= S.diagonal()[:, None]) & off).any(1) | (
        (T @ more.audio.T) >= S.diagonal()[:, None]
    ).any(1)
    assert close(stats.recall_t2a, 1 - beaten_text.double().mean(), 1e-12)
    assert (
        stats.recall_t2a < before.recall_t2a
        and stats.positive_similarity == before.positive_similarity
    )


def test_equal_ids_are_not_negatives():
    inputs = make_inputs(Case(N=6, D=5, dtype=torch.float64, radius="none"))
    ids = torch.tensor([1, 2, 3, 4, 5, 6])
    rows = torch.cat((inputs.text[:2], inputs.audio[3:]))
    arguments = (inputs.audio, inputs.text, None, 9.0)
    every = Negatives(text=rows, text_ids=torch.full((5,), 9))
    one = Negatives(text=rows, text_ids=torch.tensor([9, 9, 9, 9, 1]))
    fewer = Negatives(text=rows[:4], text_ids=torch.full((4,), 9))
    losses = [
        svr_loss_reference(*arguments, ids=ids, negatives=more, reduction="none")
        for more in (every, one, fewer)
    ]
    assert losses[1][0] < losses[0][0] and torch.equal(losses[1][1:], losses[0][1:])
    assert close(losses[1][0], losses[2][0], 1e-12)
