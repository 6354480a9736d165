"""Further negatives: columns of the similarity matrices that have no row of their own."""

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from allocations import traced
from covering import covering
from interface_cases import close
from test_reference import ALL, relative

import supclap_kernels as sk
from supclap_kernels import Negatives, svr_loss_reference
from supclap_kernels.backends import products
from supclap_kernels.backends.products import LibraryProducts
from supclap_kernels.gradients import loss_and_gradients
from supclap_kernels.testing import (
    DIFFERENTIABLE,
    NEGATIVES,
    Case,
    check,
    evaluate,
    make_inputs,
)

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


# ------------------------------------------------------------------------------------- the kernels

OPTIONS = {
    "objective": ("infonce", "siglip"),
    "bilateral": ("none", "mirror", "shared"),
    "reduction": ("mean", "sum", "none"),
    "renormalize": (False, True),
    "normalize": (False, True),
    "alpha": (1.0, 0.3),
    "beta": (0.0, 0.2),
}
FIELDS = {
    "radius": ("none", "scalar", "row"),
    "negatives": ((1, 0), (0, 1), (7, 64), (129, 7), (64, 129)),
    "duplicates": (False, True),
    "weighted": (False, True),
    "gap": (0.5, 0.1, 1e-3),
    "dtype": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "layout": ("contiguous", "strided"),
}


def accepted(case, **options):
    rounds = case.dtype == torch.bfloat16 and products.rounds_to_bfloat16()
    check(sk.fused_svr_loss, case, rounded_weights=rounds, **options)


@pytest.mark.parametrize(
    "chosen",
    covering(**OPTIONS, **FIELDS, workspace=(0, 2**28), N=(20, 70, 530)),
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
def test_every_option(chosen, poisoned_memory):
    options = {name: chosen[name] for name in OPTIONS}
    fields = {name: chosen[name] for name in FIELDS}
    if chosen["dtype"].itemsize == 2:  # a row there is a lottery
        fields["gap"] = max(0.1, fields["gap"])
    accepted(Case(N=chosen["N"], D=40, options=options, **fields), workspace=chosen["workspace"])


@pytest.mark.parametrize("multiplier", ["own products", "library's products"])
@pytest.mark.parametrize("sizes", [(600, 520), (512, 1030)])
def test_several_blocks(sizes, multiplier, monkeypatch, poisoned_memory):
    own = multiplier == "own products"
    monkeypatch.setattr("supclap_kernels.backends.cpu.call.multiplies_itself", lambda: own)
    fields = {"radius": "row", "duplicates": True, "layout": "strided", "negatives": sizes}
    for workspace in (0, 2**28):
        accepted(Case(N=520, D=24, **fields), workspace=workspace)


@pytest.mark.parametrize("workspace", [17_000, 40_000, 300_000, 900_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_workspace(workspace, dtype):
    """Blocks of a side that the packed rows are found by."""
    case = Case(N=190, D=16, dtype=dtype, radius="none", negatives=(400, 390))
    accepted(case, workspace=workspace)


def gradients_of(negatives, **options):
    inputs = make_inputs(Case(N=9, D=8, radius="row"))
    leaves = [x.clone().requires_grad_() for x in (inputs.audio, inputs.text, inputs.radius)]
    loss = sk.fused_svr_loss(*leaves, 9.0, negatives=negatives, **options)
    return loss, torch.autograd.grad(loss, leaves)


def test_none_at_all_is_the_loss_without():
    """The same bits: it is the same call."""
    before, expected = gradients_of(None)
    for nothing in (Negatives(), Negatives(audio=torch.empty(0, 8), text=torch.empty(0, 8))):
        loss, found = gradients_of(nothing)
        assert torch.equal(loss, before)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_detached_ones_cost_no_product(monkeypatch):
    """One for a matrix of logits, one for its rows' gradient, and one where they are trained."""
    calls = Counter()

    class Counted(LibraryProducts):
        def logits(self, *arguments):
            calls["logits"] += 1
            super().logits(*arguments)

        def accumulate(self, *arguments):
            calls["accumulate"] += 1
            super().accumulate(*arguments)

    monkeypatch.setattr("supclap_kernels.backends.cpu.call.multiplies_itself", lambda: False)
    monkeypatch.setattr("supclap_kernels.backends.cpu.call.LibraryProducts", Counted)
    inputs = make_inputs(Case(N=9, D=8, radius="row"))
    audio, rows = inputs.audio.requires_grad_(), make_inputs(Case(N=7, D=8, seed=3)).audio

    def products_of(negatives):
        calls.clear()
        arguments = (audio, inputs.text, inputs.radius, 9.0)
        loss = sk.fused_svr_loss(*arguments, negatives=negatives, backend="cpu:panel")
        loss.backward()
        return calls["logits"], calls["accumulate"]

    own = products_of(None)
    for trained, gradients in ((False, 1), (True, 2)):
        found = products_of(Negatives(audio=rows.clone().requires_grad_(trained)))
        # Of the texts, which are frozen here, and of their support vectors, which move the audios.
        assert found == (own[0] + 2, own[1] + 2 * gradients - 1)


def test_whatever_is_trained_alone():
    """Of the towers, the radius and the negatives."""
    inputs = make_inputs(Case(N=9, D=8, radius="row", negatives=(5, 0)))
    tensors = (inputs.audio, inputs.text, inputs.radius, inputs.audio_negatives)
    for trained in itertools.product((False, True), repeat=4):
        leaves = [x.clone().requires_grad_(t) for x, t in zip(tensors, trained, strict=True)]
        wanted = [x for x in leaves if x.requires_grad]
        results = []
        for function in (sk.fused_svr_loss, svr_loss_reference):
            loss = function(*leaves[:3], 9.0, negatives=Negatives(audio=leaves[3]))
            assert loss.requires_grad == any(trained)
            results.append(torch.autograd.grad(loss, wanted) if wanted else [loss])
        assert all(close(x, y, 1e-5) for x, y in zip(*results, strict=True)), trained
    with torch.no_grad():
        more = Negatives(audio=leaves[3])
        assert not sk.fused_svr_loss(*leaves[:3], 9.0, negatives=more).requires_grad


def test_backward_twice_and_under_autocast():
    inputs = make_inputs(Case(N=9, D=8, radius="row", negatives=(5, 6)))
    a = inputs.audio.clone().requires_grad_()
    loss = sk.fused_svr_loss(a, inputs.text, inputs.radius, 9.0, **inputs.negatives({}))
    first = torch.autograd.grad(loss, a, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, a)[0], first)
    with torch.autocast("cpu", torch.bfloat16):
        again = sk.fused_svr_loss(a, inputs.text, inputs.radius, 9.0, **inputs.negatives({}))
    assert torch.equal(again, loss)
    with pytest.raises(RuntimeError, match="second derivative"):
        once = torch.autograd.grad(again, a, create_graph=True)[0]
        once.sum().backward()


def test_statistics_of_the_kernels():
    for options in ({}, {"objective": "siglip"}, {"bilateral": "shared"}):
        case = Case(N=40, D=16, radius="row", duplicates=True, negatives=(30, 9), options=options)
        inputs = make_inputs(case)
        arguments = [getattr(inputs, name) for name in DIFFERENTIABLE]
        more = {"ids": inputs.ids, "return_stats": True, **options, **inputs.negatives({})}
        _, found = sk.fused_svr_loss(*arguments, **more)
        _, wanted = svr_loss_reference(*arguments, **more)
        for name, x, y in zip(found._fields, found, wanted, strict=True):
            assert close(x, y, 1e-5), name


def test_compiled_it_is_left_to_eager_mode():
    inputs = make_inputs(Case(N=9, D=8, radius="row", negatives=(5, 6)))
    a = inputs.audio.clone().requires_grad_()

    def loss(a):
        negatives = inputs.negatives({})["negatives"]
        return 2 * sk.fused_svr_loss(a, inputs.text, inputs.radius, 9.0, negatives=negatives)

    torch._dynamo.reset()
    for function in (loss, torch.compile(loss)):
        value = function(a)
        (gradient,) = torch.autograd.grad(value, a)
        if function is loss:
            expected = value, gradient
    assert close(value, expected[0], 1e-6) and close(gradient, expected[1], 1e-6)


def test_in_a_module():
    inputs = make_inputs(Case(N=9, D=8, negatives=(5, 6)))
    criterion = sk.SVRLoss(radius=sk.StaticRadius(0.3), beta=1.0)
    negatives = inputs.negatives({})["negatives"]
    loss = criterion(inputs.audio, inputs.text, 9.0, negatives=negatives)
    wanted = svr_loss_reference(inputs.audio, inputs.text, 0.3, 9.0, beta=1.0, negatives=negatives)
    assert close(loss, wanted, 1e-6)
    loss.backward()
    assert criterion.radius.radius.grad.abs() > 0


ROWS = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("negatives", "error", "text"),
    [
        (ROWS, TypeError, "must be supclap_kernels.Negatives"),
        (
            Negatives(audio=torch.zeros(4, 7)),
            ValueError,
            r"negatives.audio must have shape \(M, 8\)",
        ),
        (Negatives(text=torch.zeros(4)), ValueError, "negatives.text must have shape"),
        (Negatives(text=[1.0]), TypeError, "negatives.text must be a tensor"),
        (Negatives(audio=ROWS.double()), TypeError, "torch.float32 on cpu as the embeddings"),
        (Negatives(audio_ids=torch.zeros(4, dtype=torch.int64)), ValueError, "without"),
        (Negatives(ROWS, audio_ids=torch.zeros(4)), TypeError, "int64"),
        (Negatives(ROWS, audio_ids=torch.zeros(3, dtype=torch.int64)), ValueError, r"shape \(4,\)"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_errors(backend, negatives, error, text):
    inputs = make_inputs(Case(N=9, D=8, duplicates=True))
    options = {"ids": inputs.ids, "negatives": negatives, "backend": backend}
    with pytest.raises(error, match=text):
        sk.fused_svr_loss(inputs.audio, inputs.text, 0.3, 9.0, **options)


def test_their_ids_need_the_rows_ids():
    inputs = make_inputs(Case(N=9, D=8))
    negatives = Negatives(ROWS, audio_ids=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="which are missing"):
        sk.fused_svr_loss(inputs.audio, inputs.text, 0.3, 9.0, negatives=negatives)


@pytest.mark.parametrize(
    "options", [{"workspace": 0}, {"workspace": 2**20}, {}, {"backend": "reference"}]
)
@pytest.mark.parametrize("sizes", [(700, 700), (0, 3000)])
def test_memory_is_estimated(options, sizes):
    estimate = sk.memory_estimate(600, 64, negatives=sizes, **options)
    inputs = make_inputs(Case(N=600, D=64, negatives=sizes))
    leaves = [x.clone().requires_grad_() for x in (inputs.audio, inputs.text)]

    def step():
        loss = sk.fused_svr_loss(*leaves, inputs.radius, 9.0, **options, **inputs.negatives({}))
        return torch.autograd.grad(loss, leaves)

    step()
    measured = traced(step)[0].peak - sum(x.nbytes for x in leaves)
    assert 0.9 * measured < estimate < 1.1 * measured
