"""The model and the loop: padding, steps, log, seeds, chunks, checkpoints, memorisation."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from clips import SMALL, log_of, near, settings
from supclap.batches import Epoch, pad_features
from supclap.builtin import Bytes
from supclap.config import ModelConfig, TrainConfig
from supclap.corpus import load_corpus
from supclap.embeddings import embed_corpus
from supclap.errors import UserError
from supclap.evaluate import evaluate_corpus, evaluate_run
from supclap.model import SupclapModel, load_model, save_model
from supclap.ranks import Ranks
from supclap.step import backward, build_loss, build_optimizer, compute_loss, schedule
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


BYTES, ALONE = Bytes(256), Ranks(torch.device("cpu"))


def test_padding_does_not_change_an_embedding(manifest):
    torch.manual_seed(0)
    model = SupclapModel(SMALL).eval()
    corpus = load_corpus(manifest, 30.0)
    model.audio.encoder.set_statistics(corpus.sample)
    together = model.audio(*pad_features(corpus.kept))
    captions = [*corpus.captions, "a much longer caption " * 5]
    texts = model.text(*BYTES(captions, captions))
    for row, clip in enumerate(corpus.kept):  # what is beyond the end of a clip is not heard
        mel, length = torch.full((1, 400, 64), 50.0), torch.tensor([len(clip)])
        mel[0, : len(clip)] = clip
        assert (model.audio(mel, length)[0] - together[row]).abs().max() < 1e-5
    assert near(together.norm(dim=1).tolist(), [1.0] * len(together), within=1e-5)
    for number, clip in enumerate(corpus.kept):
        alone = model.audio(*pad_features([clip]))[0]
        assert (alone - together[number]).abs().max() < 1e-5
    for number, caption in enumerate(captions):
        alone = model.text(*BYTES([caption], [caption]))[0]
        assert (alone - texts[number]).abs().max() < 1e-5


def test_order_in_time_changes_an_embedding():
    torch.manual_seed(0)
    model = SupclapModel(SMALL).eval()
    mel = torch.randn(1, 80, 64) * 20
    length = torch.tensor([80])
    swapped = torch.cat([mel[:, 40:], mel[:, :40]], dim=1)
    assert (model.audio(mel, length) - model.audio(swapped, length)).abs().max() > 1e-4


def test_statistics_normalise_each_mel_bin(manifest):
    model, corpus = SupclapModel(SMALL), load_corpus(manifest, 30.0)
    model.audio.encoder.set_statistics(corpus.sample)
    frames = torch.cat(corpus.kept).double()
    assert near(model.audio.encoder.mel_mean.tolist(), frames.mean(dim=0).tolist(), within=1e-3)
    expected = frames.std(dim=0, correction=0).tolist()
    assert near(model.audio.encoder.mel_std.tolist(), expected, within=1e-3)


def test_an_epoch_is_every_pair_once_with_the_clip_as_id(manifest):
    corpus = load_corpus(manifest, 30.0)
    seen = []
    for batch in Epoch(corpus, BYTES, 4).batches():
        (mel, lengths), (text,), ids = batch[:3]
        assert len(mel) == len(lengths) == len(text) == len(ids) <= 4
        for row, (clip, length) in enumerate(zip(ids.tolist(), lengths.tolist(), strict=True)):
            assert torch.equal(mel[row, :length], corpus.kept[clip].float())
            caption = bytes(text[row][text[row] > 0].sub(1).tolist()).decode()
            assert caption in [c.lower() for c in corpus.clips[clip].captions]
            seen.append((clip, caption))
    pairs = [(c, t.lower()) for c, clip in enumerate(corpus.clips) for t in clip.captions]
    assert sorted(seen) == sorted(pairs)
    assert seen != pairs  # shuffled


def test_captions_of_one_clip_are_no_negatives_of_each_other(manifest, tmp_path):
    torch.manual_seed(0)
    model = SupclapModel(SMALL)
    criterion = build_loss(settings(manifest, tmp_path, svr="none"), 4)
    audio, text = torch.nn.functional.normalize(torch.randn(2, 4, 32), dim=2)
    _, line = compute_loss(model, criterion, audio, text, torch.tensor([7, 3, 7, 5]), ALONE)
    logits = text @ audio.T / 0.07
    logits[0, 2] = logits[2, 0] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4)).item()
    assert near(line["l_t2a"], expected, within=1e-4)


def test_the_log_has_one_object_per_step(manifest, tmp_path):
    run = train(settings(manifest, tmp_path / "run", batch_size=4, epochs=2))
    log = log_of(run)
    assert [line["step"] for line in log] == list(range(1, 2 * math.ceil(18 / 4) + 1))
    assert [line["epoch"] for line in log] == [1] * 5 + [2] * 5
    for line in log:
        assert math.isfinite(line["loss"]) and line["norm"] > 0
        assert 0 <= line["recall_t2a"] <= 1 and 0 < line["gap"] < 2
        assert near(line["logit_scale"], 1 / 0.07, within=1e-5)
        parts = line["l_t2a"] + line["l_a2t"] + line["l_svr"] + line["l_cons"]  # alpha = beta = 1
        assert near(line["loss"], parts, within=1e-4)
    assert near(log[0]["radius"], 1.0)
    assert log[-1]["radius"] != log[0]["radius"]
    assert {path.name for path in run.iterdir()} >= {"model.safetensors", "config.json"}


def test_the_seed_decides_the_log(manifest, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(settings(manifest, tmp_path / name, batch_size=5, seed=seed))
    a, b, c = ((tmp_path / name / "log.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_learning_rate_rises_then_falls_to_zero(manifest, tmp_path):
    config = settings(manifest, tmp_path)
    rates = [schedule(config, step, 100) for step in range(101)]
    assert near(rates[0], 1.0 / 5)
    assert max(rates) == rates[5] and near(rates[5], 1.0)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert near(rates[100], 0, within=1e-9)


@pytest.mark.parametrize("size", [1, 3, 18])
@pytest.mark.parametrize("svr", ["bi-static", "bi-dynamic", "none"])
def test_chunks_give_the_gradient_of_the_whole_batch(manifest, tmp_path, size, svr):
    config = settings(manifest, tmp_path, svr=svr, learn_tau=True)
    corpus = load_corpus(manifest, 30.0)
    (batch,) = Epoch(corpus, BYTES, 18).batches()
    gradients, lines = [], []
    for chunked in (False, True):
        torch.manual_seed(0)
        model, criterion = SupclapModel(SMALL), build_loss(config, 18)
        model.audio.encoder.set_statistics(corpus.sample)
        build_optimizer(config, model, criterion)
        pieces = size if chunked else None
        lines.append(backward(model, criterion, batch, pieces, ALONE))
        parameters = [*model.parameters(), *criterion.parameters()]
        grads = [p.grad.flatten() for p in parameters if p.grad is not None]
        gradients.append(torch.cat(grads))
    whole, pieces = gradients
    assert whole.norm() > 1e-2
    assert (whole - pieces).norm() < 1e-4 * whole.norm()
    assert near(lines[0]["loss"], lines[1]["loss"], within=1e-4)


def test_chunked_training_runs_and_agrees_at_the_first_step(manifest, tmp_path):
    whole = log_of(train(settings(manifest, tmp_path / "a", batch_size=9)))
    pieces = log_of(train(settings(manifest, tmp_path / "b", batch_size=9, micro_batch_size=4)))
    assert len(whole) == len(pieces)
    assert near(pieces[0]["loss"], whole[0]["loss"], within=1e-4)
    assert near(pieces[0]["norm"], whole[0]["norm"], within=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"svr": "none"},
        {"svr": "bi-dynamic"},
        {"svr": "uni-dynamic", "beta": 0.0},
        {"svr": "bi-dynamic", "radius_features": "similarities"},
        {"svr": "uni-static", "alpha": 0.5, "beta": 0.1},
        {"svr": "bi-static", "bilateral": "shared", "learn_tau": True},
        {"svr": "bi-static", "loss": "siglip"},
        {"svr": "none", "loss": "siglip"},
        {"svr": "uni-dynamic", "loss": "siglip"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_loss_trains_with_a_last_batch_of_one(manifest, tmp_path, options):
    run = train(settings(manifest, tmp_path / "run", batch_size=17, epochs=15, **options))
    log = log_of(run)
    whole = "radius_features" in options  # the paper's radius needs whole batches
    assert len(log) == (15 if whole else 30) and all(math.isfinite(line["loss"]) for line in log)
    assert log[-1 if whole else -2]["loss"] < 0.9 * log[0]["loss"]  # steps of 17 pairs
    assert (log[0]["radius"] is None) == (options["svr"] == "none")
    moved = log[-1]["logit_scale"] != log[0]["logit_scale"]
    assert moved == options.get("learn_tau", False)


def test_a_checkpoint_gives_the_same_embeddings(manifest, tmp_path):
    torch.manual_seed(2)
    model, corpus = SupclapModel(SMALL), load_corpus(manifest, 30.0)
    model.audio.encoder.set_statistics(corpus.sample)
    run = train(settings(manifest, tmp_path / "run"))  # a run to write into
    save_model(run / "model.safetensors", model)
    for before, after in zip(
        embed_corpus(model, corpus), embed_corpus(load_model(run), corpus), strict=True
    ):
        assert torch.equal(before, after)


def test_the_best_epoch_on_val_is_kept(manifest, tmp_path, monkeypatch):
    recalls = iter([0.2, 0.6, 0.4])
    kept = {}

    def scored(model, corpus, workers):
        recall = next(recalls)
        kept[recall] = {name: t.clone() for name, t in model.state_dict().items()}
        return {way: {"R@1": recall, "mAP@10": recall} for way in ("t2a", "a2t")}

    monkeypatch.setattr("supclap.run.evaluate_corpus", scored)
    run = train(settings(manifest, tmp_path / "run", val=manifest, epochs=3))
    state = load_model(run).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept[0.6].items())
    assert not all(torch.equal(state[name], tensor) for name, tensor in kept[0.4].items())
    epochs = [json.loads(line) for line in (run / "val.jsonl").read_text().splitlines()]
    assert [line["t2a"]["R@1"] for line in epochs] == [0.2, 0.6, 0.4]


def test_a_broken_checkpoint_or_setting_is_explained(manifest, tmp_path):
    run = train(settings(manifest, tmp_path / "run", epochs=1))
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        load_model(run)
    config = json.loads((run / "config.json").read_text())
    config["model"]["colour"] = 3
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not know.*colour"):
        load_model(run)
    with pytest.raises(UserError, match="not a run"):
        load_model(tmp_path / "nowhere")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(manifest, tmp_path, monkeypatch):
    whole, calls = backward, []

    def fails_late(*args):
        calls.append(1)
        return whole(*args) | ({"loss": None} if len(calls) == 3 else {})

    monkeypatch.setattr("supclap.run.backward", fails_late)
    config = settings(manifest, tmp_path / "run", epochs=5, batch_size=9)
    with pytest.raises(UserError, match="not finite at step 3; .*after step 2"):
        train(config)
    assert len(log_of(tmp_path / "run")) == 2
    load_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"lr": float("nan")}, "--lr must be a positive number"),
        ({"tau": 0.0}, "--tau must be a positive number"),
        ({"seed": -1}, "--seed must be in"),
        ({"warmup": 1.0}, "--warmup must be in"),
        ({"weight_decay": -1.0}, "--weight-decay must not be negative"),
    ],
)
def test_settings_are_checked(manifest, tmp_path, changes, expected):
    with pytest.raises(UserError, match=expected):
        settings(manifest, tmp_path, **changes)
    with pytest.raises(UserError, match="multiple of"):
        dataclasses.replace(SMALL, width=30, heads=4)


def test_it_memorises_a_handful_of_clips_with_default_settings(manifest, tmp_path):
    run = train(TrainConfig(data=manifest, out=tmp_path / "run", epochs=40))
    metrics, corpus = evaluate_run(run, manifest)
    assert len(corpus.clips) == 9
    assert metrics["t2a"]["R@1"] >= 0.9 and metrics["a2t"]["R@1"] >= 0.9
    untrained = evaluate_corpus(SupclapModel(ModelConfig()), corpus)
    assert untrained["t2a"]["R@1"] < 0.5  # the clips alone do not give it away


def torchrun(processes, *arguments):
    """`supclap train` in several processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "supclap", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    "options",
    [
        ("--queue", "20"),
        ("--svr", "bi-dynamic", "--micro-batch-size", "3", "--learn-tau"),
    ],
)
def test_two_processes_train_as_one(manifest, tmp_path, options):
    """The same loss curve over 20 steps, at the same global batch."""
    shared = ["--data", str(manifest), "--epochs", "10", "--batch-size", "9", "--device", "cpu"]
    shared += ["--width", "16", "--heads", "2", "--embed-dim", "16", "--lr", "1e-3", *options]
    torchrun(2, *shared, "--out", str(tmp_path / "two"))
    torchrun(1, *shared, "--out", str(tmp_path / "one"))
    two, alone = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    assert len(two) == len(alone) >= 20
    for ours, theirs in zip(two[:20], alone[:20], strict=True):
        assert near(ours["loss"], theirs["loss"], within=1e-4 * theirs["loss"])
        assert near(ours["radius"], theirs["radius"], within=1e-4)
        for name in ("gap", "gap_5", "gap_50", "contraction_95"):  # of nine pairs, five and four
            assert near(ours[name], theirs[name], within=1e-4)
        assert near(ours["norm"], theirs["norm"], within=1e-2 * theirs["norm"])  # before it is cut
