"""Starting from something: adapters, the last layers, an average of the weights, early ends."""

import json

import pytest
import torch
from clips import SMALL, log_of, near, settings
from safetensors.torch import load_file, save_file
from supclap import checkpoint, hub
from supclap.adapt import last_layers
from supclap.checkpoint import FINISHED
from supclap.cli import main
from supclap.config import ModelConfig
from supclap.errors import UserError
from supclap.evaluate import evaluate_run
from supclap.model import SupclapModel, load_model
from supclap.step import build_loss, build_optimizer
from supclap.train import train
from test_encoders import clap_folder, published, small_ced
from test_hub_encoders import audio_folder, bert_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    audio_folder("wav2vec2", folder / "audio")
    bert_folder(folder / "text")
    return {"audio_encoder": f"hf:{folder / 'audio'}", "text_encoder": f"hf:{folder / 'text'}",
            "embed_dim": 16, "max_seconds": 1.0}  # fmt: skip


# ---------------------------------------------------------------------------------------- adapters


def test_adapters_are_trained_and_nothing_else(manifest, tmp_path, towers):
    model = ModelConfig(**towers, lora=2)
    run = train(settings(manifest, tmp_path / "run", model=model, epochs=3, lr=1e-2))
    torch.manual_seed(0)
    before, after = SupclapModel(model).state_dict(), load_model(run).state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    encoders = {name for name in moved if ".encoder." in name}
    assert encoders and all(".lora_" in name for name in encoders)
    assert any(".head." in name for name in moved)
    assert evaluate_run(run, manifest)[0]["t2a"]["R@10"] > 0
    again = train(settings(manifest, run, model=model, epochs=4, lr=1e-2), resume=True)
    assert len(log_of(again)) == 4


def test_adapters_of_one_tower(manifest, tmp_path, towers):
    model = ModelConfig(**towers | {"audio_encoder": "builtin"}, lora=2, width=32, heads=2)
    config = settings(manifest, tmp_path, model=model, freeze="text")
    built = SupclapModel(model)
    build_optimizer(config, built, build_loss(config, 4))
    assert all(p.requires_grad for p in built.audio.encoder.parameters())
    assert not any(p.requires_grad for p in built.text.encoder.parameters())
    with pytest.raises(UserError, match="--lora needs an encoder of the hub"):
        SupclapModel(ModelConfig(width=32, heads=2, lora=2))
    with pytest.raises(UserError, match="--lora must not be negative"):
        ModelConfig(lora=-1)


def test_without_peft(manifest, tmp_path, towers, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    arguments = ["--data", str(manifest), "--out", str(tmp_path / "run"), "--lora", "2"]
    assert main(["train", *arguments, "--text-encoder", towers["text_encoder"]]) == 2
    assert "pip install 'supclap-kernels[peft]'" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- last layers


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_last_layers(manifest, tmp_path):
    model = ModelConfig(width=32, heads=2, embed_dim=16, audio_layers=3, text_layers=2)
    config = settings(manifest, tmp_path, model=model, train_last=1)
    built = SupclapModel(model)
    build_optimizer(config, built, build_loss(config, 4))
    for tower, last in ((built.audio, 2), (built.text, 1)):
        names = trained(tower.encoder)
        blocks = {name.split(".")[2] for name in names if ".blocks." in name}
        assert blocks == {str(last)} and all(".blocks." in name for name in names)
        assert len(trained(tower.head)) == len(list(tower.head.parameters()))
    config = settings(manifest, tmp_path, model=model, train_last=2, freeze="audio")
    build_optimizer(config, built, build_loss(config, 4))
    assert not trained(built.audio.encoder)
    assert len({n.split(".")[2] for n in trained(built.text.encoder) if ".blocks." in n}) == 2
    with pytest.raises(UserError, match="--train-last 3: an encoder has 2 layers"):
        config = settings(manifest, tmp_path, model=model, train_last=3)
        build_optimizer(config, built, build_loss(config, 4))


def test_the_last_layers_of_a_hub_tower(manifest, tmp_path, towers):
    model = ModelConfig(**towers)
    run = train(settings(manifest, tmp_path / "run", model=model, train_last=1, epochs=2, lr=1e-2))
    torch.manual_seed(0)
    before, after = SupclapModel(model).state_dict(), load_model(run).state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("audio.encoder.model.encoder.layers.0" in name for name in moved)
    assert any("text.encoder.model.encoder.layer.0" in name for name in moved)
    layers = ("encoder.model.encoder.layers.", "encoder.model.encoder.layer.")
    assert all(name.split(".", 1)[1].startswith((*layers, "head.")) for name in moved)


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper", "audio-spectrogram-transformer"])
def test_the_last_layers_of_audio_towers(kind, tmp_path):
    audio_folder(kind, tmp_path)
    encoder = hub.audio_encoder(str(tmp_path))
    (beginning,) = last_layers(encoder, 1)
    assert beginning.endswith("layers.0.") and "conv" not in beginning


def test_the_last_stages_of_clap(tmp_path):
    clap_folder(tmp_path, False)
    encoder = hub.audio_encoder(str(tmp_path))
    assert [name.split("layers.")[1] for name in last_layers(encoder, 1)] == ["2."]


def test_what_was_built_to_stay_stays(manifest, tmp_path):
    model = SupclapModel(SMALL)
    kept = model.text.encoder.embed.weight
    kept.requires_grad_(False)
    for freeze, expected in (("none", True), ("both", False), ("none", True)):
        config = settings(manifest, tmp_path, model=SMALL, freeze=freeze)
        build_optimizer(config, model, build_loss(config, 4))
        assert not kept.requires_grad
        assert model.text.encoder.runs.weight.requires_grad == expected
        assert model.audio.encoder.patch.weight.requires_grad == expected
    audio_folder("whisper", tmp_path / "whisper")
    whisper = hub.audio_encoder(str(tmp_path / "whisper"))
    assert not whisper.model.embed_positions.weight.requires_grad


def test_two_ways_at_once():
    with pytest.raises(UserError, match="--train-last and --lora are two ways"):
        settings("a", "b", train_last=1, model=ModelConfig(text_encoder="hf:x", lora=2))


def test_adapters_of_a_published_ced(tmp_path):
    (tmp_path / "ced").mkdir()
    save_file(published(small_ced()), tmp_path / "ced/model.safetensors")
    kind = {"model_type": "ced", "embed_dim": 16, "num_heads": 2, "depth": 2}
    (tmp_path / "ced/config.json").write_text(json.dumps(kind))
    model = ModelConfig(audio_encoder=f"hf:{tmp_path / 'ced'}", width=32, heads=2, lora=2)
    config = settings("a", "b", model=model)
    built = SupclapModel(model)
    build_optimizer(config, built, build_loss(config, 4))
    names = trained(built.audio.encoder)
    assert names and all(".lora_" in name for name in names)
    assert len(trained(built.text.encoder)) == len(list(built.text.encoder.parameters()))


# ------------------------------------------------------------------------------------------ average


def test_an_average_of_the_weights(manifest, tmp_path):
    options = {"epochs": 4, "batch_size": 6, "lr": 1e-2}
    plain = train(settings(manifest, tmp_path / "plain", **options))
    run = train(settings(manifest, tmp_path / "run", ema=0.5, **options))
    assert [x["loss"] for x in log_of(run)] == [x["loss"] for x in log_of(plain)]
    raw = torch.load(run / "finished.pt", weights_only=True)
    name = "text.head.3.weight"
    assert torch.equal(raw["model"][name], load_file(plain / "model.safetensors")[name])
    kept = load_file(run / "model.safetensors")[name]
    assert torch.equal(kept, raw["average"][f"module.{name}"])
    assert not torch.equal(kept, raw["model"][name])


def test_the_average_by_hand(manifest, tmp_path):
    """One step an epoch: after each the average is half of it and half of the new weights."""
    options = {"batch_size": 18, "lr": 1e-2, "schedule": "constant", "warmup": 0.0}
    name, mean = "audio.head.0.weight", None
    for epochs in (1, 2, 3, 4):
        run = train(settings(manifest, tmp_path / f"{epochs}", epochs=epochs, ema=0.5, **options))
        state = torch.load(run / "finished.pt", weights_only=True)
        new = state["model"][name].double()
        mean = new if mean is None else (mean + new) / 2
        assert near(state["average"][f"module.{name}"].double(), mean, within=1e-6)


def test_an_average_resumes(manifest, tmp_path):
    options = {"batch_size": 6, "ema": 0.9, "schedule": "constant", "warmup": 0.0}
    whole = train(settings(manifest, tmp_path / "whole", epochs=4, **options))
    part = train(settings(manifest, tmp_path / "part", epochs=2, **options))
    train(settings(manifest, part, epochs=4, **options), resume=True)
    ours, theirs = (load_file(x / "model.safetensors") for x in (part, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------- early ends


def test_training_ends_where_nothing_gets_better(manifest, tmp_path, monkeypatch, capsys):
    recalls = iter([0.1, 0.3, 0.2, 0.3, 0.25, 0.2])
    monkeypatch.setattr("supclap.run.mean_recall", lambda metrics: next(recalls))
    options = {"batch_size": 6, "val": manifest, "patience": 3}
    run = train(settings(manifest, tmp_path / "run", epochs=9, **options))
    assert [x["epoch"] for x in log_of(run, "val")] == [1, 2, 3, 4, 5]
    assert "ended: 3 validations found nothing better" in capsys.readouterr().out
    kept = json.loads((run / FINISHED).read_text())["model"]
    assert kept.startswith("the checkpoint after epoch 2")
    train(settings(manifest, run, epochs=10, **options | {"patience": 1}), resume=True)
    assert [x["epoch"] for x in log_of(run, "val")] == [1, 2, 3, 4, 5, 6]


def test_within_an_epoch(manifest, tmp_path, monkeypatch):
    recalls = iter([0.5, 0.4, 0.3])
    monkeypatch.setattr("supclap.run.mean_recall", lambda metrics: next(recalls))
    options = {"batch_size": 2, "val": manifest, "patience": 2, "validate_every": 2}
    run = train(settings(manifest, tmp_path / "run", epochs=3, **options))
    assert len(log_of(run)) == 6
    with pytest.raises(UserError, match="--patience needs --val"):
        settings(manifest, tmp_path, patience=2)
    assert checkpoint.Progress(step=1).since == 0 and SMALL.lora == 0
