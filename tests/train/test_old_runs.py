"""Runs that an earlier version began: a radius without dimensions, other defaults."""

import json

import pytest
import torch
from clips import log_of, settings
from safetensors.torch import load_file, save_file
from supclap.checkpoint import STATE
from supclap.config import read_config
from supclap.model import load_model
from supclap.step import build_loss
from supclap.train import train
from test_resume import Stop, stopped_at

pytestmark = pytest.mark.usefixtures("one_thread")


def without_dimensions(state):
    """The same, as it was once written; how many tensors changed."""
    changed = 0
    state["criterion"]["radius.radius"] = state["criterion"]["radius.radius"].reshape(())
    for moments in state["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape == (1,):
                moments[name] = moments[name].reshape(())
                changed += 1
    return changed


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_an_old_run_is_resumed(manifest, tmp_path, monkeypatch, optimizer):
    """Bit for bit as one of today."""
    options = {"svr": "bi-static", "batch_size": 4, "checkpoint_every": 2, "optimizer": optimizer}
    whole = train(settings(manifest, tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        stopped_at(patch, 4)
        with pytest.raises(Stop):
            train(settings(manifest, tmp_path / "part", **options))
    path = tmp_path / "part" / STATE
    state = torch.load(path, weights_only=True)
    assert without_dimensions(state) == 2
    torch.save(state, path)
    run = train(read_config(tmp_path / "part"), resume=True)
    assert log_of(run) == log_of(whole)
    ours, theirs = load_model(run).state_dict(), load_model(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_old_model_file_is_read(manifest, tmp_path):
    run = train(settings(manifest, tmp_path / "run", svr="bi-static", batch_size=4))
    tensors = load_file(run / "model.safetensors")
    name = "criterion.radius.radius"
    assert tensors[name].shape == (1,)
    save_file({**tensors, name: tensors[name].reshape(())}, run / "model.safetensors")
    assert load_model(run).state_dict().keys()
    config = read_config(run)
    criterion = build_loss(config, 4)
    state = load_file(run / "model.safetensors")
    criterion.load_state_dict({"radius.radius": state[name]})
    assert torch.equal(criterion.radius.radius, tensors[name])


@pytest.mark.parametrize("svr, beta", [("bi-static", 0.0), ("uni-dynamic", 0.01), ("none", 0.0)])
def test_an_old_run_keeps_its_reading_of_the_radius(manifest, tmp_path, svr, beta):
    """It was free and without a bound, and a weight that nobody gave was the paper's."""
    run = train(settings(manifest, tmp_path / svr, svr=svr, epochs=1))
    path = run / "config.json"
    written = json.loads(path.read_text())
    for name in ("support", "radius_bound"):
        del written[name]
    path.write_text(json.dumps(written | {"beta": None, "radius_init": 0.1}))
    config = read_config(run)
    assert (config.support, config.radius_bound, config.radius_init) == ("free", "none", 0.1)
    assert config.beta == beta and not build_loss(config, 4).options["renormalize"]
    for old, ids in ((True, "clip"), (False, "none"), ("caption", "caption")):
        path.write_text(json.dumps(written | {"beta": 0.3, "ids": old}))
        assert read_config(run).beta == 0.3 and read_config(run).ids == ids
