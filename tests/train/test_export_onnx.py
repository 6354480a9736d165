"""Both towers as ONNX graphs."""

import json

import pytest
import soundfile
import supclap
import torch
from exports import TEXTS, bert_folder, hub_run, sounds
from supclap import hub_audio
from supclap.cli import main
from supclap.exports.onnx import WITHIN
from test_encoders import clap_folder, sonar_folder
from test_hub_encoders import audio_folder

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def session(path):
    return pytest.importorskip("onnxruntime").InferenceSession(path)


def ran(path, **inputs):
    return torch.from_numpy(session(path).run(None, {k: v.numpy() for k, v in inputs.items()})[0])


def test_onnx_hears_and_reads_as_the_run(manifest, run, tmp_path, capsys):
    tmp_path = tmp_path / "out"
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("of PyTorch") == 3
    model, said = supclap.load(run), json.loads((tmp_path / "onnx.json").read_text())
    assert (said["sample_rate"], said["dimensions"]) == (16_000, 32)
    assert said["ids"]["at_most"] == 256 and said["shortest_wave"] == 512
    features = [model.features(sound) for sound in sounds(manifest)]
    padded, lengths = supclap.batches.pad_features(features)
    found = ran(tmp_path / "audio.onnx", features=padded, lengths=lengths)
    assert (found - model.embed_audio(sounds(manifest))).abs().max() < WITHIN
    (ids,) = model.model.text.encoder.tokenizer(TEXTS, ["eng"] * 3)
    found = ran(tmp_path / "text.onnx", ids=ids)
    assert (found - model.embed_text(TEXTS)).abs().max() < WITHIN
    by_hand = [[byte + 1 for byte in text.lower().encode()] for text in TEXTS]
    longest = max(map(len, by_hand))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in by_hand])
    assert torch.equal(ran(tmp_path / "text.onnx", ids=padded), found)
    for sound, expected in zip(sounds(manifest), features, strict=True):
        wave, rate = soundfile.read(sound, dtype="float32")
        if rate == said["sample_rate"]:
            mel = ran(tmp_path / "features.onnx", wave=torch.from_numpy(wave))
            assert (mel - expected.float()).abs().max() < 0.07  # those are in half precision
            one = ran(tmp_path / "audio.onnx", features=mel[None], lengths=torch.tensor([len(mel)]))
            assert (one - model.embed_audio(sound)).abs().max() < 1e-3


HUB = ("audio-spectrogram-transformer", "whisper", "wav2vec2", "hubert")


@pytest.mark.parametrize("kind", HUB)
def test_onnx_of_hub_encoders(kind, manifest, tmp_path):
    audio_folder(kind, tmp_path / "audio")
    text = bert_folder(tmp_path / "text")
    pooling = {"audio-spectrogram-transformer": "cls", "whisper": "lasttoken"}.get(kind, "mean")
    (text / "1_Pooling").mkdir()
    (text / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    run, out = hub_run(manifest, tmp_path, audio=tmp_path / "audio", text=text), tmp_path / "out"
    assert main(["export", str(run), "--to", "onnx", "--out", str(out)]) == 0
    model, said = supclap.load(run), json.loads((out / "onnx.json").read_text())
    names = ["features"] if kind in hub_audio.WAVES else ["features", "lengths"]
    assert said["selected_on"] == "test"
    assert said["inputs"] == {"audio": names, "text": ["ids", "mask"]}
    for sound in sounds(manifest):
        features, lengths = supclap.batches.pad_features([model.features(sound)])
        inputs = {"features": features, "lengths": lengths}
        inputs = {name: inputs[name] for name in said["inputs"]["audio"]}
        found = ran(out / "audio.onnx", **inputs)
        assert (found - model.embed_audio(sound)).abs().max() < WITHIN
    assert not (out / "features.onnx").exists() and "shortest_wave" not in said
    assert (out / "audio_encoder" / "preprocessor_config.json").is_file()
    assert said["ids"]["at_most"] == 38 and said["ids"]["prompt"] == ""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "text_encoder")
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    found = ran(out / "text.onnx", ids=tokens["input_ids"], mask=tokens["attention_mask"])
    assert (found - model.embed_text(TEXTS)).abs().max() < WITHIN


def test_onnx_of_clap_and_of_sonar(manifest, tmp_path, capsys):
    clap_folder(tmp_path / "clap")
    sonar_folder(tmp_path / "sonar")
    run = hub_run(manifest, tmp_path, audio=tmp_path / "clap", text=tmp_path / "sonar")
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {"audio.onnx", "text.onnx"}


def test_what_cannot_be_exported_is_explained(manifest, tmp_path, capsys):
    clap_folder(tmp_path / "clap", fusion=True)
    run = hub_run(manifest, tmp_path, audio=tmp_path / "clap", text=bert_folder(tmp_path / "b"))
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "cannot export audio to ONNX" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"clap", "b", "run"}


def test_a_wrong_graph_is_an_error(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("supclap.exports.onnx.WITHIN", 0.0)
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "differs from PyTorch" in capsys.readouterr().err and not [*tmp_path.iterdir()]
