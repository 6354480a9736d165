"""Force decomposition against autograd, the contraction identity, and the running statistics."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import supclap_kernels as sk
from supclap_kernels.reference import gap_and_direction, infonce_rows, siglip_rows
from supclap_kernels.testing import DIFFERENTIABLE, Case, Inputs, make_inputs

OBJECTIVES = ("infonce", "siglip")
MODES = [
    {"objective": objective, "bilateral": bilateral}
    for objective, bilateral in itertools.product(OBJECTIVES, ("none", "mirror", "shared"))
]
DOUBLE = torch.float64


def near(x: Tensor, y: Tensor, bound: float = 1e-12) -> bool:
    return bool((x.double() - y.double()).norm() <= bound * y.double().norm())


def arguments(inputs: Inputs) -> dict[str, Any]:
    names = (*DIFFERENTIABLE, "ids", "weight")
    return {name: getattr(inputs, name) for name in names}


def summed_gradient(inputs: Inputs, **options: Any) -> Tensor:
    """Gradient of the summed loss with respect to the texts, by the specification."""
    given = arguments(inputs)
    given["text"] = inputs.text.detach().requires_grad_()
    loss = sk.svr_loss_reference(**given, reduction="sum", **options)
    return torch.autograd.grad(loss, given["text"])[0]


# --------------------------------------------------------------------------------------- the forces

FORCES: list[Case] = [
    *(Case(dtype=DOUBLE, radius="row", options=mode) for mode in MODES),
    *(
        Case(
            dtype=DOUBLE,
            radius="row",
            weighted=True,
            duplicates=True,
            options={**mode, "alpha": 0.7, "beta": 0.3},
        )
        for mode in MODES
    ),
    Case(dtype=DOUBLE, radius="none"),
    Case(dtype=DOUBLE, radius="scalar", options={"renormalize": False}),
    Case(dtype=DOUBLE, radius="row", gap=1e-3, options={"beta": 1.0}),
    Case(N=1, dtype=DOUBLE, radius="row", options={"objective": "siglip"}),
]


@pytest.mark.parametrize("case", FORCES, ids=str)
def test_the_force_is_minus_the_gradient(case):
    inputs = make_inputs(case)
    found = sk.force_decomposition(**arguments(inputs), **case.options)
    force = -summed_gradient(inputs, **case.options)
    assert near(found.force, force) and found.force.abs().max() > 0
    if not case.options.get("beta"):
        assert near(found.pull + found.push, force)
    assert not any(value.requires_grad for value in found)


def test_the_constraint_is_the_rest_of_the_force():
    """Where R > r it pushes the text away from the audio, with weight beta."""
    case = Case(dtype=DOUBLE, radius="row", weighted=True, options={"beta": 0.3})
    inputs = make_inputs(case)
    found = sk.force_decomposition(**arguments(inputs), **case.options)
    r, u = gap_and_direction(inputs.text, inputs.audio)
    outside = inputs.radius > r
    assert 0 < outside.sum() < case.N
    wanted = -(0.3 * inputs.weight * outside)[:, None] * u
    rest = found.force - found.pull - found.push
    assert (rest - wanted).norm() <= 1e-12 * found.force.norm()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parts_come_through_positives_and_negatives(mode):
    """One pair has no negative; with one id for all nothing is left but the positives."""
    case = Case(dtype=DOUBLE, radius="row", options=mode)
    inputs = make_inputs(case)
    given = arguments(inputs)
    given["ids"] = torch.zeros(case.N, dtype=torch.int64)
    found = sk.force_decomposition(**given, **mode)
    assert not found.push.abs().max() > 0
    assert not found.parallel.abs().max() > 0 and not found.perpendicular.abs().max() > 0
    assert (found.pull.abs().max() > 0) == (mode["objective"] == "siglip")


def test_plain_infonce_pulls_towards_the_audio():
    """Pull_i = k (2 - p_ii - q_ii) a_i, and push_i the p-weighted sum over the other audios."""
    inputs = make_inputs(Case(dtype=DOUBLE, radius="none"))
    k, T, A = 9.0, inputs.text, inputs.audio
    found = sk.force_decomposition(A, T, logit_scale=k)
    p, q = (k * T @ A.t()).softmax(dim=1), (k * T @ A.t()).softmax(dim=0)
    amount = k * (2.0 - p.diagonal() - q.diagonal())
    assert near(found.pull, amount[:, None] * A)
    others = 1.0 - torch.eye(len(T), dtype=DOUBLE)
    assert near(found.push, -k * ((p + q) * others) @ A)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_definitions(mode):
    case = Case(dtype=DOUBLE, radius="row", options={**mode, "beta": 0.1})
    inputs = make_inputs(case)
    found = sk.force_decomposition(**arguments(inputs), **case.options)
    r, u = gap_and_direction(inputs.text, inputs.audio)
    along = (found.push * u).sum(dim=1)
    assert near(found.parallel, along)
    # |push|^2 - <push, u>^2, as u has length 1 up to the smoothing of r
    square = found.push.square().sum(dim=1) - along.square()
    assert near(found.perpendicular.square(), square, 1e-5)
    length = found.force.norm(dim=1)
    audio = inputs.audio
    assert near(found.drift_audio, (found.force * audio).sum(1) / (length * audio.norm(dim=1)))
    assert near(found.drift_gap, (found.force * u).sum(1) / (length * u.norm(dim=1)))
    assert near(found.contraction, 1.0 - inputs.radius / r)
    for value in (found.drift_audio, found.drift_gap):
        assert value.shape == (case.N,) and value.abs().max() <= 1.0 + 1e-12


def test_without_a_radius_nothing_is_contracted():
    inputs = make_inputs(Case(radius="none"))
    found = sk.force_decomposition(inputs.audio, inputs.text)
    assert torch.equal(found.contraction, torch.ones(37))
    assert found.force.dtype == torch.float32


@pytest.mark.parametrize("objective", ["infonce", "siglip"])
def test_in_every_mode_of_autograd(objective):
    """During an evaluation, too, and of what was made there."""
    case = Case(N=9, D=8, radius="row", weighted=True, duplicates=True)

    def found(inputs):
        every = (inputs.audio, inputs.text, inputs.radius, inputs.logit_scale)
        given = [*every, torch.tensor(-1.0)] if objective == "siglip" else every
        options = {"ids": inputs.ids, "weight": inputs.weight, "objective": objective}
        return sk.force_decomposition(*given, **options)

    wanted = found(make_inputs(case))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            made = make_inputs(case)
            within = found(made)
        for parts in (within, found(made)):
            assert all(map(torch.equal, parts, wanted))


def test_forces_act_on_the_normalised_rows():
    inputs = make_inputs(Case(dtype=DOUBLE, options={"normalize": True}))
    A, T = inputs.audio, inputs.text
    found = sk.force_decomposition(A, T, 0.2, normalize=True)
    unit = sk.force_decomposition(F.normalize(A, dim=1), F.normalize(T, dim=1), 0.2)
    assert all(near(x, y) for x, y in zip(found, unit, strict=True))


def test_numbers_and_tensors_agree():
    inputs = make_inputs(Case(dtype=DOUBLE))
    A, T = inputs.audio, inputs.text
    by_number = sk.force_decomposition(A, T, 0.2, 9.0)
    R, k = (torch.tensor(x, dtype=DOUBLE, requires_grad=True) for x in (0.2, 9.0))
    by_tensor = sk.force_decomposition(A.requires_grad_(), T.requires_grad_(), R.expand(37), k)
    assert all(torch.equal(x, y) for x, y in zip(by_number, by_tensor, strict=True))


# -------------------------------------------------------------------------------- the contraction


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("R", [0.0, 0.2, 0.9, -0.4])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_gradient_of_the_svr_term_is_contracted_across_u(objective, R, renormalize):
    """One-sided, constant R: the part of dL_svr/dt along u is that of dL_svr/dt_sup, the part
    across it 1 - R / r times as large; on the sphere t_sup is the vector before it is put there.
    """
    inputs = make_inputs(Case(dtype=DOUBLE, options={"objective": objective}))
    A, T = inputs.audio, inputs.text.requires_grad_()
    k, b = 9.0, torch.tensor(-4.0, dtype=DOUBLE)
    options: dict[str, Any] = {
        "objective": objective, "bilateral": "none", "reduction": "sum", "renormalize": renormalize,
    }  # fmt: skip
    bias = b if objective == "siglip" else None
    whole = sk.fused_svr_loss(A, T, R, k, bias, alpha=1.0, **options)
    plain = sk.fused_svr_loss(A, T, None, k, bias, **options)
    gradient = torch.autograd.grad(whole, T)[0] - torch.autograd.grad(plain, T)[0]

    r, u = gap_and_direction(T.detach(), A)
    T_sup = (T.detach() + R * u).requires_grad_()
    keep = torch.ones(len(A), len(A), dtype=torch.bool)
    shown = F.normalize(T_sup, dim=1) if renormalize else T_sup
    logits = k * shown @ A.t()
    rows = infonce_rows(logits, keep) if objective == "infonce" else siglip_rows(logits + b, keep)
    (at_support,) = torch.autograd.grad(rows.sum(), T_sup)

    unit = F.normalize(u, dim=1)
    along, along_support = ((g * unit).sum(dim=1) for g in (gradient, at_support))
    across = gradient - along[:, None] * unit
    across_support = at_support - along_support[:, None] * unit
    assert near(across, (1.0 - R / r)[:, None] * across_support, 1e-11)
    assert near(along, along_support, 1e-6)  # exact but for the smoothing of r, (1e-4 / r)^2
    assert across.norm() > 0.01 * along.norm() > 0
    if R:
        assert not near(across, across_support, 0.05)


# ----------------------------------------------------------------------------------- the statistics


def stats_of(case: Case, fused: bool, inputs: Inputs | None = None) -> sk.SVRStats:
    given = arguments(make_inputs(case) if inputs is None else inputs)
    function = sk.fused_svr_loss if fused else sk.svr_loss_reference
    return function(**given, return_stats=True, **case.options)[1]


def assert_same_stats(found: sk.SVRStats, wanted: sk.SVRStats, bound: float) -> None:
    for name, x, y in zip(wanted._fields, found, wanted, strict=True):
        assert x.shape == () and not x.requires_grad, name
        if y.isnan():
            assert x.isnan(), name
        else:
            assert near(x, y, bound), f"{name}: {x.item()} instead of {y.item()}"


STATS = [
    Case(N=N, radius="row", weighted=extras, duplicates=extras, options=mode)
    for mode in MODES
    for extras in (False, True)
    for N in (37, 130)
]


@pytest.mark.parametrize("case", STATS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (DOUBLE, 1e-12)])
def test_stats_are_those_of_the_specification(case, dtype, bound):
    case = Case(**{**vars(case), "dtype": dtype})
    inputs = make_inputs(case)
    wanted = stats_of(case, False, inputs.to(DOUBLE))
    assert_same_stats(stats_of(case, True, inputs), wanted, bound)


@pytest.mark.parametrize(
    "options",
    [{"normalize": True}, {"renormalize": False}, {"reduction": "none"}, {"workspace": 0}],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stats_under_other_options(options, objective):
    case = Case(N=70, dtype=DOUBLE, radius="row", options={"objective": objective, **options})
    assert_same_stats(stats_of(case, True), stats_of(case, False), 1e-12)


def test_stats_by_hand():
    """Against the definitions, not against the specification's own code."""
    case = Case(N=6, D=4, dtype=DOUBLE, radius="row", weighted=True, options={"bilateral": "none"})
    inputs = make_inputs(case)
    ids = torch.tensor([0, 1, 2, 0, 3, 4])
    A, T, R, w, k = inputs.audio, inputs.text, inputs.radius, inputs.weight, inputs.logit_scale
    _, stats = sk.fused_svr_loss(A, T, R, k, weight=w, ids=ids, bilateral="none", return_stats=True)
    S, N = T @ A.t(), 6
    r = ((A - T).square().sum(1) + 1e-8).sqrt()
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j and ids[i] != ids[j]]

    def cross_entropy(s: Tensor) -> Tensor:
        rows = [
            torch.stack([k * s[i, j] for j in range(N) if j == i or (i, j) in pairs]).logsumexp(0)
            - k * s[i, i]
            for i in range(N)
        ]
        return (w * torch.stack(rows)).mean()

    t_sup = T + (R / r)[:, None] * (A - T)
    t_sup = t_sup / t_sup.norm(dim=1, keepdim=True)
    beaten = [any(S[i, j] >= S[i, i] for j in range(N) if (i, j) in pairs) for i in range(N)]
    beaten_column = [any(S[j, i] >= S[i, i] for j in range(N) if (i, j) in pairs) for i in range(N)]
    wanted = sk.SVRStats(
        cross_entropy(S),
        cross_entropy(S.t()),
        cross_entropy(t_sup @ A.t()),
        (w * (F.relu(R - r) + F.relu(-R))).mean(),
        torch.tensor(1 - sum(beaten) / N),
        torch.tensor(1 - sum(beaten_column) / N),
        S.diagonal().mean(),
        torch.stack([S[i, j] for i, j in pairs]).mean(),
        R.mean(),
        r.mean(),
        (1 - R / r).mean(),
    )
    for name, x, y in zip(wanted._fields, stats, wanted, strict=True):
        assert near(x, y, 1e-7 if name.startswith("recall") else 1e-12), name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ties_count_against_the_model(fused, objective):
    """One-hot rows, so that the products are exact: pairs 0 and 1 share their audio, 2 and 3 their
    text.
    """
    A, T = torch.eye(8), torch.eye(8)
    A[1], T[3] = A[0], T[2]
    T[1], A[3] = T[0], A[2]
    case = Case(N=8, D=8, radius="none", options={"objective": objective})
    inputs = make_inputs(case)
    changed = Inputs(**{**vars(inputs), "audio": A, "text": T})
    stats = stats_of(case, fused, changed)
    assert stats.recall_t2a == 0.5 and stats.recall_a2t == 0.5
    ids = torch.tensor([0, 0, 2, 2, 4, 5, 6, 7])
    stats = stats_of(case, fused, Inputs(**{**vars(changed), "ids": ids}))
    assert stats.recall_t2a == 1.0 and stats.recall_a2t == 1.0


@pytest.mark.parametrize("fused", [True, False])
def test_a_duplicate_on_one_side_only(fused):
    """Equal audios with different texts: only the texts' ranking is tied."""
    A, T = torch.eye(6), torch.eye(6)
    A[1] = A[0]
    T[0], T[1] = F.normalize(torch.tensor([[3.0, 4, 0, 0, 0, 0], [4.0, 3, 0, 0, 0, 0]]), dim=1)
    case = Case(N=6, D=6, radius="none")
    stats = stats_of(case, fused, Inputs(**{**vars(make_inputs(case)), "audio": A, "text": T}))
    assert near(stats.recall_t2a, torch.tensor(4 / 6), 1e-6)
    # Audio 0 prefers text 1 to its own; audio 1 has its own first.
    assert near(stats.recall_a2t, torch.tensor(5 / 6), 1e-6)


@pytest.mark.parametrize("n", [8, 37, 64, 100, 600])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_no_row_wins_against_its_copy(fused, dtype, n):
    """The second half repeats the first. Small integers, so that every product is exact."""
    generator = torch.Generator().manual_seed(0)
    T = torch.randint(-2, 3, (n, 24), generator=generator).to(dtype)
    A = T + torch.randint(0, 2, (n, 24), generator=generator)
    half = n // 2
    A[half : 2 * half], T[half : 2 * half] = A[:half].clone(), T[:half].clone()
    case = Case(N=n, D=24, dtype=dtype, radius="none", scale=0.125)
    inputs = Inputs(**{**vars(make_inputs(case)), "audio": A, "text": T})
    found = stats_of(case, fused, inputs)
    assert found.recall_t2a <= n % 2 / n + 1e-7 and found.recall_a2t <= n % 2 / n + 1e-7
    ids = torch.arange(n) % half
    alone = stats_of(case, fused, Inputs(**{**vars(inputs), "ids": ids}))
    assert alone.recall_t2a > 0.3 and alone.recall_a2t > 0.3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_there_is_not_is_nan(fused, objective):
    plain = stats_of(Case(radius="none", options={"objective": objective}), fused)
    assert plain.l_svr == 0 and plain.l_cons == 0
    for name in ("radius", "gap", "contraction"):
        assert getattr(plain, name).isnan()
    for name in set(plain._fields) - {"radius", "gap", "contraction"}:
        assert torch.isfinite(getattr(plain, name)), name
    single = stats_of(Case(N=1, options={"objective": objective}), fused)
    assert single.negative_similarity.isnan() and single.recall_t2a == 1.0 == single.recall_a2t
    assert torch.isfinite(single.radius) and torch.isfinite(single.contraction)
    case = Case(options={"objective": objective})
    alone = Inputs(**{**vars(make_inputs(case)), "ids": torch.zeros(37, dtype=torch.int64)})
    stats = stats_of(case, fused, alone)
    assert stats.negative_similarity.isnan() and stats.recall_t2a == 1.0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_terms_are_unweighted_by_alpha_and_beta(fused, mode):
    """alpha = 0 still reports L_svr, and the loss is their weighted sum."""
    base = Case(dtype=DOUBLE, radius="row", weighted=True, options=mode)
    inputs = make_inputs(base)
    function = sk.fused_svr_loss if fused else sk.svr_loss_reference
    reported = []
    for alpha, beta in ((0.0, 0.0), (1.0, 0.0), (0.3, 2.0)):
        options = {**mode, "alpha": alpha, "beta": beta, "return_stats": True}
        loss, stats = function(**arguments(inputs), **options)
        assert stats.l_svr > 0.01 and stats.l_cons > 0.01
        total = stats.l_t2a + stats.l_a2t + alpha * stats.l_svr + beta * stats.l_cons
        assert near(loss, total)
        reported.append(torch.stack(tuple(stats)))
    assert all(near(x, reported[0]) for x in reported)


def test_fields_are_the_documented_ones():
    assert sk.SVRStats._fields == (
        *("l_t2a", "l_a2t", "l_svr", "l_cons", "recall_t2a", "recall_a2t"),
        *("positive_similarity", "negative_similarity", "radius", "gap", "contraction"),
    )
    assert sk.ForceDecomposition._fields == (
        *("force", "pull", "push", "parallel", "perpendicular"),
        *("drift_audio", "drift_gap", "contraction"),
    )
