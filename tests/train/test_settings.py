"""Flags, TOML, recipes; what each setting of training does; what the diagnostics say."""

import math
import re

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from clips import SMALL, log_of, near, settings
from supclap.batches import Batch, Epoch, pad_features
from supclap.builtin import Bytes
from supclap.cli import main
from supclap.config import (
    MODEL,
    RECIPES,
    TRAIN,
    ModelConfig,
    TrainConfig,
    build_config,
    config_text,
    read_config,
)
from supclap.corpus import load_corpus
from supclap.diagnose import QUANTILES, Diagnosis, spread
from supclap.errors import UserError
from supclap.model import SupclapModel
from supclap.parser import build_parser
from supclap.ranks import Ranks
from supclap.step import build_loss, build_optimizer, compute_loss, schedule
from supclap.train import train

from supclap_kernels import SVRLoss

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = Ranks(torch.device("cpu"))


# --------------------------------------------------------------------------------------- settings


def parsed(*arguments):
    options = vars(build_parser().parse_args(["train", *map(str, arguments)]))
    options.pop("command")
    assert options.pop("resume") is None
    config, recipe = options.pop("config"), options.pop("recipe")
    return build_config(options, config, recipe)


def test_flags_come_before_the_file_and_the_file_before_the_recipe(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'data = "a.csv"\nout = "b"\nepochs = 3\nlr = 1\nbatch_size = 7\nlearn-tau = true\n'
        'svr = "uni-static"\nwidth = 64\nthreads = 2\n'
    )
    config = parsed("--config", path, "--recipe", "paper", "--epochs", 5, "--no-learn-tau")
    assert (config.epochs, config.batch_size, config.lr) == (5, 7, 1.0)
    assert config.svr == "uni-static" and config.learn_tau is False and config.model.width == 64
    assert config.optimizer == "adam" and config.beta == 0.01 and config.threads == 2
    assert str(config.data) == "a.csv" and type(config.lr) is float


def test_the_papers_run():
    config = parsed("--recipe", "paper", "--data", "a", "--out", "b")
    assert config.model.audio_encoder == "hf:mispeech/ced-base"
    assert "SONAR" in config.model.text_encoder
    expected = {"optimizer": "adam", "lr": 5e-5, "batch_size": 24, "epochs": 10, "tau": 0.07,
              "alpha": 1.0, "beta": 0.01, "svr": "bi-dynamic", "schedule": "constant"}  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert set(RECIPES["paper"]) <= set(TRAIN) | set(MODEL)


def test_every_setting_is_a_flag_and_survives_the_run_folder(tmp_path):
    config = parsed("--data", "a", "--out", tmp_path, "--val", "v.csv", "--clip-grad", 0)
    (tmp_path / "config.json").write_text(config_text(config))
    assert read_config(tmp_path) == config
    (tmp_path / "config.json").rename(tmp_path / "x")
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "x").rename(moved / "config.json")
    assert read_config(moved).out == moved  # a run may be moved
    text = build_parser()._subparsers._group_actions[0].choices["train"].format_help()
    for name in (*TRAIN, *MODEL):
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colour = 3", "unknown key 'colour'"),
        ("[model]\nwidth = 3", "unknown key 'model'"),
        ("epochs = 1.5", "epochs must be int, got 1.5"),
        ('epochs = "3"', "epochs must be int, got '3'"),
        ("learn_tau = 1", "learn_tau must be bool, got 1"),
        ("epochs = true", "epochs must be int, got True"),
        ("data = 3", "data must be Path, got 3"),
        ("epochs = ", "run.toml: "),
        ('svr = "tri"', "--svr must be one of"),
        ("", "--data is needed: manifest"),
    ],
)
def test_a_bad_file_is_explained(tmp_path, text, expected):
    path = tmp_path / "run.toml"
    path.write_text(text if "is needed" in expected else text + "\n")
    options = {} if "is needed" in expected or "data" in text else {"data": "a"}
    with pytest.raises(UserError) as error:
        build_config({"out": tmp_path, **options}, path)
    assert expected in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        build_config({}, tmp_path / "none.toml")


# ------------------------------------------------------------------------------------ optimisation


def test_towers_have_their_own_learning_rates_and_may_be_frozen(manifest, tmp_path):
    options = {"audio_lr": 1e-4, "text_lr": 2e-4, "svr": "bi-dynamic", "freeze": "none"}
    for freeze in ("none", "audio", "text", "both"):
        config = settings(manifest, tmp_path, **(options | {"freeze": freeze}))
        model, criterion = SupclapModel(SMALL), build_loss(config, 18)
        optimizer = build_optimizer(config, model, criterion)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, p in [*model.named_parameters(), *criterion.named_parameters()]:
            side = name.split(".")[0] if ".encoder." in name else ""
            frozen = side and freeze in (side, "both")
            if frozen or name in ("log_scale", "logit_bias"):
                assert id(p) not in group_of and not p.requires_grad
                continue
            group = group_of.pop(id(p))
            assert group["lr"] == {"audio": 1e-4, "text": 2e-4}.get(side, config.lr)
            matrix = p.ndim > 1 and not name.startswith("radius")
            assert group["weight_decay"] == (0.01 if matrix else 0.0)
        assert not group_of


def test_constant_schedule_without_warm_up(manifest, tmp_path):
    config = settings(manifest, tmp_path, schedule="constant", warmup=0.0)
    assert {schedule(config, step, 100) for step in range(100)} == {1.0}
    log = log_of(train(settings(manifest, tmp_path / "r", schedule="constant", warmup=0.0)))
    assert {line["lr"] for line in log} == {1e-3}


def test_gradients_are_clipped_unless_told_not_to(manifest, tmp_path):
    runs = {}
    for clip in (1e-6, 0.0):
        options = {"clip_grad": clip, "optimizer": "adam", "weight_decay": 0.0, "batch_size": 18}
        runs[clip] = log_of(train(settings(manifest, tmp_path / f"{clip}", **options, epochs=3)))
    assert runs[1e-6][0]["norm"] == runs[0.0][0]["norm"] > 1
    assert runs[1e-6][-1]["loss"] != runs[0.0][-1]["loss"]


def test_bfloat16_lowers_the_encoders_only(manifest, tmp_path):
    full = log_of(train(settings(manifest, tmp_path / "a", epochs=4)))
    low = log_of(train(settings(manifest, tmp_path / "b", epochs=4, precision="bf16")))
    assert full[0]["loss"] != low[0]["loss"]
    assert near(full[0]["loss"], low[0]["loss"], within=0.01 * full[0]["loss"])
    assert near(full[-1]["loss"], low[-1]["loss"], within=0.05 * full[-1]["loss"])
    model = SupclapModel(SMALL)
    model.audio.bf16 = model.text.bf16 = True
    batch = pad_features([torch.randn(40, 64)])
    assert model.audio(*batch).dtype is torch.float32
    low, model = model.audio(*batch), model.eval()
    assert not torch.equal(low, model.audio(*batch))  # evaluation is in float32


def test_without_ids_captions_of_one_clip_are_negatives(manifest, tmp_path):
    logs = [
        log_of(train(settings(manifest, tmp_path / f"{ids}", ids=ids, batch_size=18)))
        for ids in ("clip", "none")
    ]
    assert logs[0][0]["l_t2a"] < logs[1][0]["l_t2a"]


def test_tensorboard_has_the_numbers_of_the_log(manifest, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(settings(manifest, tmp_path / "run", tensorboard=True, val=manifest))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("log/loss")]
    assert [step for step, _ in losses] == [line["step"] for line in log_of(run)]
    pairs = zip(losses, log_of(run), strict=True)
    assert all(near(value, line["loss"], 1e-5) for (_, value), line in pairs)
    assert "val/t2a/R@1" in events.Tags()["scalars"]


def test_a_missing_tensorboard_is_named(manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    monkeypatch.delitem(__import__("sys").modules, "torch.utils.tensorboard", raising=False)
    arguments = ["train", "--data", str(manifest), "--out", str(tmp_path / "r"), "--tensorboard"]
    assert main([*arguments, "--width", "16", "--heads", "1"]) == 2
    assert "tensorboard is not installed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("options", [{"svr": "bi-dynamic"}, {"svr": "none"}, {"loss": "siglip"}])
def test_diagnostics_are_the_gradients(manifest, tmp_path, options):
    """The force is minus the gradient of the summed loss; the update is the change of the texts."""
    torch.manual_seed(0)
    config = settings(manifest, tmp_path, **options)
    model, criterion = SupclapModel(SMALL), build_loss(config, 18)
    corpus = load_corpus(manifest, 30.0)
    model.audio.encoder.set_statistics(corpus.sample)
    build_optimizer(config, model, criterion)
    text = model.text.encoder.tokenizer(corpus.captions, corpus.languages)
    clips = corpus.clip_of
    batch = Batch(pad_features([corpus.kept[clip] for clip in clips.tolist()]), text, clips)
    states = {name: module.training for name, module in model.named_modules()}
    diagnosis = Diagnosis(model, criterion, batch, 5, ALONE)
    assert states == {name: module.training for name, module in model.named_modules()}
    a, t = model.audio(*batch.audio).detach(), model.text(*batch.text).detach().requires_grad_()
    loss, _ = compute_loss(model, criterion, a, t, clips, ALONE)
    if options["svr" if "svr" in options else "loss"] == "bi-dynamic":
        radius = criterion.radius(a, t.detach(), model.logit_scale).detach()
        fixed = SVRLoss(None, **{**criterion.options, "return_stats": False})
        fixed.radius = lambda *_: radius  # the decomposition holds R still
        loss = fixed(a, t, model.logit_scale, ids=clips)
    force = -torch.autograd.grad(loss, t)[0] * len(t)
    line = dict(diagnosis.line)
    assert near(line["drift_audio"], F.cosine_similarity(force, a).mean().item(), 1e-5)
    u = F.normalize(a - t.detach(), dim=1)
    assert near(line["drift_gap"], F.cosine_similarity(force, u).mean().item(), 1e-5)
    assert near(line["force"], force.norm(dim=1).mean().item(), 1e-3)
    assert line["gap"] == spread((a - t).norm(dim=1)) and len(line["gap"]) == len(QUANTILES)
    if "svr" in options and options["svr"] == "none":
        assert line["radius"] is None and near(line["contraction"], 1.0)
        assert line["push_perpendicular"] == line["push_perpendicular_without_svr"]
    else:
        assert len(line["radius"]) == len(QUANTILES) and line["contraction"] < 1
        assert line["push_perpendicular"] != line["push_perpendicular_without_svr"]
    with torch.no_grad():
        for p in model.text.parameters():
            p.add_(0.01 * torch.randn_like(p))
    change = (model.text(*batch.text) - t).detach()
    line = diagnosis.finish()
    assert near(line["update_audio"], F.cosine_similarity(change, a).mean().item(), 1e-4)
    assert near(line["update_gap"], F.cosine_similarity(change, u).mean().item(), 1e-4)


def test_diagnostics_change_nothing_and_come_every_k_steps(manifest, tmp_path):
    options = {"batch_size": 5, "model": ModelConfig(**{**vars(SMALL), "dropout": 0.2})}
    plain = log_of(train(settings(manifest, tmp_path / "a", **options)))
    run = train(settings(manifest, tmp_path / "b", diagnose_every=3, **options))
    assert log_of(run) == plain and len(plain) == 8
    lines = log_of(run, "diagnostics")
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        for value in line.values():
            assert all(map(math.isfinite, value if isinstance(value, list) else [value]))


def test_help_names_every_choice():
    text = re.sub(
        r"\s+", " ", build_parser()._subparsers._group_actions[0].choices["train"].format_help()
    )
    for words in ("uni-static", "bi-dynamic", "siglip", "mirror", "ced-tiny|mini|small|base"):
        assert words in text
    assert TrainConfig.__dataclass_fields__["svr"].metadata["choices"][0] == "none"


# ---------------------------------------------------------------------------- what is drawn, built


def test_epochs_and_pairs_draw_their_own_numbers(tmp_path):
    """Every epoch has another order; every pair, and every epoch, another part of a long clip."""
    names = [f"{n}.wav" for n in range(6)]
    for name in names:
        soundfile.write(tmp_path / name, np.random.default_rng(0).normal(0, 0.1, 48_000), 16_000)
    rows = "\n".join(f"{name},caption {n}" for n, name in enumerate(names))
    (tmp_path / "m.csv").write_text(f"file_name,caption\n{rows}\n")
    corpus = load_corpus(tmp_path / "m.csv", 1.0)
    seen = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        (batch,) = Epoch(corpus, Bytes(64), 6, seed, epoch).batches()
        sums = dict(zip(batch.ids.tolist(), batch.audio[0].sum(dim=(1, 2)).tolist(), strict=True))
        seen.append((batch.ids.tolist(), sums))
    for order, sums in seen[:3]:
        assert len(set(sums.values())) == 6  # the clips are equal, their parts are not
        for other_order, other_sums in seen[:3]:
            if sums is not other_sums:
                assert order != other_order
                assert all(sums[n] != other_sums[n] for n in range(6))
    assert seen[3] == seen[0]


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
@pytest.mark.parametrize("svr", ["none", "uni-static", "bi-static", "uni-dynamic", "bi-dynamic"])
def test_every_loss_by_name(manifest, tmp_path, loss, svr):
    built = {}
    for bilateral in ("mirror", "shared"):
        for beta in (None, 0.0, 0.3):
            options = {"loss": loss, "svr": svr, "bilateral": bilateral}
            options |= {} if beta is None else {"beta": beta}
            built[bilateral, beta] = build_loss(settings(manifest, tmp_path, **options), 18)
    for (bilateral, beta), criterion in built.items():
        side, _, kind = svr.partition("-")
        assert criterion.options["objective"] == loss
        assert criterion.options["bilateral"] == (bilateral if side == "bi" else "none")
        assert criterion.options["beta"] == (1.0 if beta is None else beta)
        assert criterion.options["renormalize"]
        names = {"static": "StaticRadius", "dynamic": "DynamicRadius", "": "NoneType"}
        assert type(criterion.radius).__name__ == names[kind]
