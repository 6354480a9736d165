"""How a run reads the radius: its settings, what its log says of it, and the warning."""

import math

import pytest
import torch
from clips import log_of, near, settings
from interface_cases import close
from supclap import notes
from supclap import run as module
from supclap.errors import UserError
from supclap.model import SupclapModel
from supclap.ranks import Ranks
from supclap.reproduction.experiments import CHOSEN
from supclap.step import SPREAD, build_loss, build_optimizer, pair_numbers
from supclap.train import train
from torch.nn.functional import normalize

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = Ranks(torch.device("cpu"))


@pytest.mark.parametrize("svr", ["uni-static", "bi-dynamic"])
def test_settings_reach_the_criterion(manifest, tmp_path, svr):
    config = settings(
        manifest, tmp_path, svr=svr, support="sphere", radius_bound="gap", radius_init=0.25,
        detach_similarity=True, radius_lr=0.03, lr=0.001,
    )  # fmt: skip
    criterion = build_loss(config, 4)
    assert criterion.options["renormalize"] and criterion.radius.bound == "gap"
    audio, text = (normalize(torch.randn(4, 8), dim=1).requires_grad_() for _ in range(2))
    R = criterion.radius(audio, text, 14.0)
    assert close(R, 0.25 * (audio - text).norm(dim=1), 1e-4)
    R.sum().backward()
    assert audio.grad is None and text.grad is None
    groups = build_optimizer(config, SupclapModel(config.model, 0.07), criterion).param_groups
    ours = {id(p) for p in criterion.parameters()}
    for group in groups:
        for p in group["params"]:
            assert group["peak"] == (0.03 if id(p) in ours else 0.001)
    other = build_loss(settings(manifest, tmp_path, svr=svr, support="free", beta=0.0), 4)
    assert not other.options["renormalize"] and other.radius.bound == "none"
    assert other.options["beta"] == 0.0


@pytest.mark.parametrize("svr", ["bi-static", "bi-dynamic"])
def test_the_defaults_are_the_chosen_reading(manifest, tmp_path, svr):
    config = settings(manifest, tmp_path, svr=svr)
    assert {name: getattr(config, name) for name in CHOSEN} == CHOSEN
    criterion = build_loss(config, 4)
    assert criterion.options["renormalize"] and criterion.options["beta"] == 1.0
    audio, text = (normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    assert close(criterion.radius(audio, text, 14.0), torch.ones(4 if "dynamic" in svr else ()), 0)


def test_a_bounded_radius_starts_within_the_gap(manifest, tmp_path):
    for share in (0.0, 1.0, 1.5):
        with pytest.raises(UserError, match="--radius-init must be R / r, between 0 and 1, got"):
            settings(manifest, tmp_path, radius_bound="gap", radius_init=share)
    with pytest.raises(UserError, match="--radius-lr must be a positive number"):
        settings(manifest, tmp_path, radius_lr=0.0)


def test_what_the_log_says_of_the_pairs():
    text, audio = torch.zeros(5, 2), torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0], [5, 0]])
    R = torch.tensor([0.5, 1.0, 7.0, 6.0, 1.0])
    numbers = pair_numbers(audio, text, R, ALONE)
    assert near(float(numbers["gap"]), 3.0) and near(float(numbers["gap_50"]), 3.0)
    assert near(float(numbers["beyond_gap"]), 0.4)
    assert near(float(numbers["beyond_twice_gap"]), 0.2)
    contraction = 1 - R / torch.arange(1.0, 6.0)
    for share in SPREAD:
        point = numbers[f"contraction_{100 * share:.0f}"]
        assert near(float(point), float(contraction.quantile(share)))
    one = pair_numbers(audio, text, torch.tensor(2.5), ALONE)
    assert near(float(one["radius_5"]), 2.5) and near(float(one["beyond_gap"]), 0.4)
    none = pair_numbers(audio, text, None, ALONE)
    assert near(float(none["gap_95"]), 4.8)
    for name in ("radius_50", "contraction_5", "beyond_gap", "beyond_twice_gap"):
        assert math.isnan(none[name])


def test_a_run_logs_them(manifest, tmp_path):
    names = [f"{name}_{point}" for name in ("radius", "contraction") for point in (5, 50, 95)]
    names += ["beyond_gap", "beyond_twice_gap"]
    for svr in ("none", "bi-static", "bi-dynamic"):
        run = train(settings(manifest, tmp_path / svr, svr=svr, micro_batch_size=3, epochs=1))
        for line in log_of(run):
            assert line["gap_5"] <= line["gap_50"] <= line["gap_95"]
            assert all((line[name] is None) == (svr == "none") for name in names)
            if svr == "bi-static":
                assert near(line["radius_5"], line["radius_95"], within=1e-6)


@pytest.mark.parametrize("svr", ["bi-static", "bi-dynamic"])
def test_a_run_takes_no_radius_of_the_other_kind(manifest, tmp_path, capsys, svr):
    first = train(settings(manifest, tmp_path / "first", svr=svr, epochs=1))
    second = settings(
        manifest, tmp_path / "second", svr=svr, epochs=1, init=first, radius_bound="gap",
        radius_init=0.4,
    )  # fmt: skip
    line = log_of(train(second))[0]
    assert "has no such radius: this one begins anew" in capsys.readouterr().out
    assert near(line["contraction_50"], 0.6, within=1e-3)


@pytest.mark.parametrize("init, told, beta", [(9.0, 1, 0.5), (9.0, 1, 1.0), (0.1, 0, 0.5)])
def test_a_radius_that_ran_away_is_told_once(
    manifest, tmp_path, monkeypatch, capsys, init, told, beta
):
    """With a remedy that the run does not have."""
    monkeypatch.setattr(notes, "REVERSED_STEPS", 3)
    options = {"svr": "bi-static", "radius_init": init, "batch_size": 4, "epochs": 6, "beta": beta}
    train(settings(manifest, tmp_path / "run", **options))
    printed = capsys.readouterr().out
    assert printed.count("NOTE: for 3 steps most pairs have had a radius R beyond") == told
    assert ("--radius-bound gap" in printed) == bool(told)
    assert ("--support sphere" in printed) == bool(told and beta < 1)


@pytest.mark.parametrize(
    "svr, below, above, told",
    [("bi-dynamic", -0.1, 0.1, "beyond 1 times"), ("uni-static", -0.6, -0.4, "beyond 1.5 times")],
)
def test_a_few_steps_are_no_reason_to_warn(svr, below, above, told):
    run = module.Run.__new__(module.Run)
    run.reversed_steps, run.told, said = 0, False, []
    run.say, run.config = said.append, settings("data.csv", "run", svr=svr)
    for median in [below] * 49 + [above] * 100 + [below] * 49 + [None] + [below] * 49:
        run.mind_contraction(median)
    assert not said
    for _ in range(200):
        run.mind_contraction(below)
    assert len(said) == 1 and told in said[0]


def test_the_diagnosis_knows_the_sphere(manifest, tmp_path):
    lines = []
    for support in ("free", "sphere"):
        config = settings(manifest, tmp_path / support, svr="bi-static", support=support,
                          radius_init=0.7, diagnose_every=1, epochs=1)  # fmt: skip
        train(config)
        lines.append(log_of(config.out, "diagnostics")[0])
    assert lines[0]["radius"] == lines[1]["radius"]
    assert lines[0]["push_perpendicular"] != lines[1]["push_perpendicular"]
    assert lines[0]["push_perpendicular_without_svr"] == lines[1]["push_perpendicular_without_svr"]
