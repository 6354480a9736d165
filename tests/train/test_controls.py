"""The controls of the reproduction, what it asks of a radius, and its rule for the readings."""

import json
import math
from pathlib import Path

import pytest
import torch
from clips import near, settings
from interface_cases import close
from supclap.reproduction.controls import CONTROLS, Control, Term, build_control
from supclap.reproduction.difficulty import NEAR, difficulty, spearman
from supclap.reproduction.experiments import (
    DYNAMIC,
    INFONCE,
    LITERAL,
    PRESETS,
    STATIC,
    Experiment,
)
from supclap.reproduction.findings import Findings, pairs_of
from supclap.reproduction.readings import judge
from torch.nn.functional import normalize

import supclap_kernels as sk

N, D, SCALE = 10, 6, torch.tensor(9.0)


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return [normalize(x, dim=1).requires_grad_() for x in made]


def gradients(loss: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, of))


@pytest.mark.parametrize("renormalize", [False, True])
def test_radius_zero_is_infonce_twice(renormalize):
    audio, text = rows()
    ids = torch.arange(N) // 2
    loss, _ = Control(CONTROLS["R = 0"], renormalize)(audio, text, SCALE, ids=ids)
    infonce = sk.fused_svr_loss(audio, text, None, SCALE, ids=ids)
    assert near(loss.item(), 2 * infonce.item())
    # The gradient of x_i goes through both terms, that of y_j through the logits of both.
    for x, y in zip(gradients(loss, audio, text), gradients(2 * infonce, audio, text), strict=True):
        if not renormalize:  # else the part along x_i is projected out
            assert close(x, y, 1e-5)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("across", [0.0, 0.5, 1.0])
def test_the_push_across_is_what_a_control_says(renormalize, across):
    """Values are those of support vectors half way; the gradient of x_i is theirs with another
    factor on its part across the step."""
    audio, text = (x.detach() for x in rows())
    r, u = sk.reference.gap_and_direction(text, audio)
    support = (text + 0.5 * r[:, None] * u).requires_grad_()
    shown = normalize(support, dim=1) if renormalize else support
    wanted = torch.nn.functional.cross_entropy(SCALE * shown @ audio.t(), torch.arange(N))
    (slope,) = gradients(wanted, support)
    text.requires_grad_()
    control = Control(Term(0.5, across), renormalize)
    made = control.support_vectors(text, audio, control.term)
    loss = torch.nn.functional.cross_entropy(SCALE * made @ audio.t(), torch.arange(N))
    assert near(loss.item(), wanted.item())
    along = (slope * u).sum(dim=1, keepdim=True) * u
    assert close(gradients(loss, text)[0], along + across * (slope - along), 1e-9)


@pytest.mark.parametrize("renormalize", [False, True])
def test_half_the_push_across_is_what_svr_does(renormalize):
    """Of support vectors of the texts, with R = r / 2 held still."""
    audio, text = rows()
    r, _ = sk.reference.gap_and_direction(text.detach(), audio.detach())
    infonce = sk.fused_svr_loss(audio, text, None, SCALE, backend="reference")
    options = {"bilateral": "none", "renormalize": renormalize, "backend": "reference"}
    svr = sk.fused_svr_loss(audio, text, 0.5 * r, SCALE, **options)
    control = Control(CONTROLS["these, and a smaller push across"], renormalize)
    made = control.support_vectors(text, audio.detach(), control.term)
    term = torch.nn.functional.cross_entropy(SCALE * made @ audio.detach().t(), torch.arange(N))
    (theirs,) = gradients(svr - infonce, text)
    assert close(gradients(term, text)[0], theirs, 1e-6)


def test_a_pull_of_twice_the_force():
    audio, text = rows()
    (of_infonce,) = gradients(sk.fused_svr_loss(audio, text, None, SCALE), text)
    loss, _ = Control(CONTROLS["a pull of twice the force"], False)(audio, text, SCALE)
    forces = sk.force_decomposition(audio, text, None, SCALE)
    # The text's own row and its column: both have the same positive.
    assert close(gradients(loss, text)[0] - of_infonce, -forces.pull / N, 1e-9)


def test_controls_are_built_from_settings(tmp_path):
    for name in CONTROLS:
        criterion = build_control(settings("a", tmp_path, support="sphere"), name)
        assert criterion.on_sphere and criterion.radius is None
        loss, stats = criterion(*(x.float() for x in rows()), SCALE)
        assert loss.isfinite() and stats.l_t2a.isfinite()


def test_spearman_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert near(spearman(x, x.exp()), 1.0) and near(spearman(x, -x), -1.0)
    assert near(spearman(x, torch.tensor([1, 1, 2, 2])), 2 / math.sqrt(5))
    assert math.isnan(spearman(x, torch.ones(4)))
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randint(0, 5, (2, 30), generator=torch.Generator().manual_seed(0))
    assert near(spearman(a, b), stats.spearmanr(a, b).statistic, within=1e-9)


class Oracle(torch.nn.Module):
    """Says how far the nearest other clip of the batch is beyond the caption's own."""

    def forward(self, audio, text, scale):
        similarity = text @ audio.t()
        own = similarity.diagonal()
        return (similarity - own[:, None]).amax(dim=1) + 1


def test_a_radius_that_knows_hard_pairs_is_seen(tmp_path):
    generator = torch.Generator().manual_seed(0)
    audio = normalize(torch.randn(40, 8, generator=generator), dim=1)
    text = normalize(audio + 0.5 * torch.randn(40, 8, generator=generator), dim=1)
    config = settings("a", tmp_path, batch_size=40)
    numbers = difficulty(Oracle(), config, text, audio, torch.arange(40))
    assert numbers["R and rank"] > 0.5 and numbers["R and failure"] > 0.5
    assert numbers["R where not found"] > numbers["R where found"]
    scores = text @ audio.t()
    hard = (scores > scores.diagonal()[:, None] - NEAR).sum(dim=1) - 1
    assert near(numbers["R and hard negatives"], spearman(Oracle()(audio, text, 1), hard))
    assert difficulty(Oracle(), config, audio, audio, torch.arange(40))["R and rank"] is None


# ------------------------------------------------------------------------------ readings, by a rule


def make_run(out: Path, name: str, seed: int, recall: float, log: list[dict], **changes) -> None:
    folder = out / "runs" / Experiment(name, seed, changes=changes).folder
    folder.mkdir(parents=True)
    way = {"R@1": recall}
    result = {"name": name, "seed": seed, "here": {"t2a": way, "a2t": way}}
    (folder / "result.json").write_text(json.dumps(result))
    lines = [json.dumps({"step": n, **line}) for n, line in enumerate(log, 1)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def log_with(ratios: list[float], radii: list[float], share: float = 0.0) -> list[dict]:
    """100 steps; the first tenth is wild, and does not count."""
    steps = [*[(9.0, 9.0)] * 10]
    for n in range(90):
        part = n / 89
        steps.append(
            tuple(x[0] + (x[-1] - x[0]) * part for x in (ratios, radii))  # in a straight line
        )
    return [
        {"contraction_50": 1 - ratio, "radius": R, "beyond_twice_gap": 1.0 if n < 10 else share}
        for n, (ratio, R) in enumerate(steps)
    ]


@pytest.mark.parametrize(
    "kind, ratios, radii, share, recall, letters",
    [
        ("dynamic", [0.9, 1.0], [1.2, 0.7], 0.0, 0.5, "abc"),
        ("dynamic", [0.9, 1.0], [1.2, 0.7], 0.0, 0.39, "abc"),  # as well, within the interval
        ("dynamic", [0.9, 1.2], [1.2, 0.7], 0.0, 0.5, "bc"),  # beyond the gap
        ("dynamic", [-0.1, 0.5], [1.2, 0.7], 0.0, 0.5, "bc"),  # negative
        ("dynamic", [0.9, 1.0], [1.2, 0.7], 0.02, 0.5, "bc"),  # some pairs amplified
        ("dynamic", [0.9, 1.0], [0.7, 0.8], 0.0, 0.5, "ac"),  # rises
        ("dynamic", [0.9, 1.0], [1.2, 0.7], 0.0, 0.2, "ab"),  # retrieves worse
        ("static", [1.4, 1.1], [1.2, 0.7], 0.5, 0.5, "abc"),  # follows the mean gap only
        ("static", [1.6, 1.1], [1.2, 0.7], 0.0, 0.5, "bc"),
        ("static", [0.9, 1.25], [1.2, 0.7], 0.0, 0.5, "bc"),
        ("static", [1.6, 1.3], [0.7, 0.8], 0.0, 0.2, "none"),
    ],
)
def test_the_rule_for_readings(tmp_path, kind, ratios, radii, share, recall, letters):
    name = STATIC if kind == "static" else DYNAMIC
    for seed in range(3):
        noise = 0.01 * seed
        make_run(tmp_path, name, seed, recall + noise, log_with(ratios, radii, share))
        make_run(tmp_path, name, seed, 0.4 - noise, [], **LITERAL)
    findings = Findings(tmp_path, PRESETS["smoke"])
    findings.seeds = 3
    judgement = judge(findings, kind, findings.runs(name))
    assert judgement.letters() == letters and judgement.runs == 3
    low, high = judgement.ratio
    assert near(low, min(ratios), within=0.02) and near(high, max(ratios), within=0.02)
    assert near(judgement.radius[0], radii[0], within=0.02)
    assert near(judgement.beyond_twice, share)
    one = judge(findings, kind, findings.runs(name)[:1])
    assert one.falls is None and one.as_good is None  # one run decides nothing


def test_results_are_paired_by_seed(tmp_path):
    for seed in (0, 2):
        make_run(tmp_path, INFONCE, seed, 0.1, [])
    for seed in (1, 2):
        make_run(tmp_path, STATIC, seed, 0.3, [])
    findings = Findings(tmp_path, PRESETS["cpu"])
    pairs = pairs_of(findings.runs(STATIC), findings.runs(INFONCE))
    assert [(a["seed"], b["seed"], a["name"]) for a, b in pairs] == [(2, 2, STATIC)]
