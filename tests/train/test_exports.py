"""Runs in the forms of other libraries: transformers, sentence-transformers, ONNX, MTEB."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import supclap
import torch
from clips import SMALL, near, settings
from exports import TEXTS, bert_folder, hub_run, sounds
from supclap.cli import main
from supclap.config import read_config
from supclap.exports.folder import shareable
from supclap.model import load_model, selection_note
from supclap.train import train
from test_hub_encoders import audio_folder

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "folder"
    assert main(["export", str(run), "--to", "hub", "--out", str(out)]) == 0
    return out


# ------------------------------------------------------- transformers and sentence-transformers


def test_transformers_loads_it(manifest, run, folder):
    model, expected = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True), None
    expected = supclap.load(run)
    assert not model.training and model.config.model_type == "supclap"
    audio, text = expected.embed_audio(sounds(manifest)), expected.embed_text(TEXTS)
    assert torch.equal(model.embed_audio(sounds(manifest)), audio)
    assert torch.equal(model.embed_text(TEXTS), text)
    assert torch.equal(model.similarity(TEXTS, sounds(manifest)), text @ audio.T)


def test_its_forward_is_clap_like(manifest, run, folder):
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    features = [model.embedder.features(sound) for sound in sounds(manifest)]
    tokens = model.model.text.encoder.tokenizer(TEXTS, ["eng"] * 3)
    output = model(*supclap.batches.pad_features(features), *tokens)
    cosines = model.similarity(TEXTS, sounds(manifest))
    scale = model.model.logit_scale.item()
    assert near(output.logits_per_text.tolist(), (scale * cosines).tolist(), within=1e-4)
    assert torch.equal(output.logits_per_audio, output.logits_per_text.T)
    output.logits_per_text.diag().sum().backward()
    assert all(p.grad is not None for p in model.model.audio.parameters())
    assert near(output.audio_embeds.norm(dim=1).tolist(), [1.0] * 3)


def test_what_was_trained_further_is_saved(manifest, folder, tmp_path):
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        model.model.text.head[0].bias += 1.0
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(again.embed_text(TEXTS), model.embed_text(TEXTS))
    first = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert not torch.equal(again.embed_text(TEXTS), first.embed_text(TEXTS))
    model.save_pretrained(tmp_path / "saved")  # over the first
    model.save_pretrained(folder.parent / "other")
    assert torch.equal(load(folder.parent / "other").embed_text(TEXTS), model.embed_text(TEXTS))


def load(folder, **options):
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


def test_saved_in_place(manifest, tmp_path):
    """A folder whose encoders are of the hub, by either library; and what each then loads."""
    st = pytest.importorskip("sentence_transformers")
    audio_folder("whisper", tmp_path / "w")
    run = hub_run(manifest, tmp_path, audio=tmp_path / "w", text=bert_folder(tmp_path / "b"))
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "hub", "--out", str(out)]) == 0
    model = load(out)
    with torch.no_grad():
        model.model.text.head[0].bias += 1.0
    model.save_pretrained(out)
    assert torch.equal(load(out).embed_text(TEXTS), model.embed_text(TEXTS))
    other = st.SentenceTransformer(str(out), trust_remote_code=True)
    with torch.no_grad():
        other[0].model.text.head[0].bias += 1.0
    other.save_pretrained(str(out))
    assert near(load(out).embed_text(TEXTS), other.encode(TEXTS))


def test_options_of_the_download(monkeypatch, folder):
    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    from supclap.exports.transformers import HubModel

    model, info = HubModel.from_pretrained(
        "me/model", revision="v1", token="t", output_loading_info=True, attn_implementation="x"
    )
    assert info == {} and model.embedder.width == 32
    assert asked["me/model"]["revision"] == "v1" and asked["me/model"]["token"] == "t"
    assert any("safetensors" in pattern for pattern in asked["me/model"]["allow_patterns"])


def test_uploaded_as_a_folder(monkeypatch, folder):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append(sorted(p.name for p in Path(folder_path).rglob("*.safetensors")))
            return options

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    options = load(folder).push_to_hub("me/model", private=True, token="t", commit_message="x")
    assert options == {"commit_message": "x"}
    assert calls == ["t", ("me/model", True, True), ["model.safetensors"]]


def test_a_folder_that_is_there_stays(manifest, run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    before = (run / "config.json").read_text()
    for to in ("hub", "onnx"):
        for out in (tmp_path, run, tmp_path / "README.md"):
            assert main(["export", str(run), "--to", to, "--out", str(out)]) == 2
            assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (run / "config.json").read_text() == before


def test_files_of_an_earlier_encoder_are_gone(manifest, tmp_path):
    """They would say how the new one is pooled."""
    audio_folder("whisper", tmp_path / "w")
    folders = [bert_folder(tmp_path / name) for name in ("cls", "mean")]
    (folders[0] / "1_Pooling").mkdir()
    (folders[0] / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (folders[0] / "sentence_bert_config.json").write_text('{"max_seq_length": 3}')
    for folder in folders:
        model = replace(SMALL, text_encoder=f"hf:{folder}")
        options = {"epochs": 1, "overwrite": True, "model": model}
        run = train(settings(manifest, tmp_path / "run", **options))
    assert not (run / "text_encoder" / "1_Pooling").exists()
    encoder = load_model(run).text.encoder
    assert encoder.pooling == "mean" and encoder.tokenizer.most == 38


def test_what_is_needed_is_said(manifest, run, folder, tmp_path):
    assert "supclap-kernels[hub]" in (folder / "README.md").read_text()
    assert "supclap-kernels[hub]" in (folder / "modeling_supclap.py").read_text()
    audio_folder("whisper", tmp_path / "w")
    model = replace(SMALL, audio_encoder=f"hf:{tmp_path / 'w'}", lora=2)
    adapted = train(settings(manifest, tmp_path / "run", model=model, epochs=1))
    out = tmp_path / "out"
    assert main(["export", str(adapted), "--to", "hub", "--out", str(out)]) == 0
    assert "supclap-kernels[peft]" in (out / "README.md").read_text()
    expected = supclap.load(adapted).embed_audio(sounds(manifest))
    assert torch.equal(load(out).embed_audio(sounds(manifest)), expected)


def test_siglip_has_its_bias(manifest, tmp_path):
    run = train(settings(manifest, tmp_path / "run", loss="siglip", epochs=1))
    assert main(["export", str(run), "--to", "hub", "--out", str(tmp_path / "hub")]) == 0
    model = load(tmp_path / "hub")
    features = [model.embedder.features(sound) for sound in sounds(manifest)]
    tokens = model.model.text.encoder.tokenizer(TEXTS, ["eng"] * 3)
    logits = model(*supclap.batches.pad_features(features), *tokens).logits_per_text
    cosines = model.similarity(TEXTS, sounds(manifest))
    expected = model.model.logit_scale * cosines + model.model.logit_bias
    assert near(logits.tolist(), expected.tolist(), within=1e-4) and float(logits.max()) < 5.0
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    said = json.loads((tmp_path / "onnx" / "onnx.json").read_text())
    assert said["logit_bias"] == model.model.logit_bias.item()


def test_sentence_transformers_loads_it(manifest, run, folder):
    st = pytest.importorskip("sentence_transformers")
    model, expected = st.SentenceTransformer(str(folder), trust_remote_code=True), supclap.load(run)
    assert model.get_embedding_dimension() == 32 and model.similarity_fn_name == "cosine"
    audio, text = expected.embed_audio(sounds(manifest)), expected.embed_text(TEXTS)
    assert near(model.encode(TEXTS), text.numpy(), within=1e-6)
    assert near(model.encode(sounds(manifest)), audio.numpy(), within=1e-6)
    assert near(model.encode(TEXTS, batch_size=1), text.numpy(), within=1e-6)
    waves = [soundfile.read(sound, dtype="float32") for sound in sounds(manifest)]
    given = [{"array": wave, "sampling_rate": rate} for wave, rate in waves]
    assert near(model.encode(given), audio.numpy(), within=1e-6)
    resampled = soundfile.read(sounds(manifest)[1], dtype="float32")
    assert resampled[1] == 16_000 == model[0].sampling_rate  # of bare samples
    assert near(model.encode([resampled[0]])[0], audio[1].numpy(), within=1e-6)
    assert near(model.encode(["no_such.wav"]), expected.embed_text("no_such.wav").numpy(), 1e-6)
    assert near(model.encode(TEXTS, prompt="a "), expected.embed_text([f"a {t}" for t in TEXTS]))
    assert near(model.encode(["", " ", "."])[0], expected.embed_text(".")[0])
    assert near(model.encode(TEXTS, lang="fra"), text.numpy(), within=1e-6)
    with pytest.raises(ValueError, match="no language"):
        model.encode(TEXTS, lang="nonsense")


def test_sentence_transformers_trains_and_saves_it(manifest, folder, tmp_path):
    """By its own trainer, on sentences and sounds."""
    st = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = st.SentenceTransformer(str(folder), trust_remote_code=True)
    before = model[0].model.text.head[0].weight.detach().clone()
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": sounds(manifest)})
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path / "trained"), num_train_epochs=2, per_device_train_batch_size=3,
        learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True,
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(model)
    st.SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss).train()
    assert not torch.equal(model[0].model.text.head[0].weight, before)
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_encoders_of_the_hub_go_with_it(manifest, tmp_path):
    audio_folder("audio-spectrogram-transformer", tmp_path / "ast")
    run = hub_run(manifest, tmp_path, audio=tmp_path / "ast", text=bert_folder(tmp_path / "bert"))
    expected = supclap.load(run)
    vectors = expected.embed_audio(sounds(manifest)), expected.embed_text(TEXTS)
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "hub", "--out", str(out)]) == 0
    for path in (tmp_path / "ast", tmp_path / "bert", run):  # the folder needs none of them
        path.rename(path.with_name(f"{path.name}-away"))
    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(model.embed_audio(sounds(manifest)), vectors[0])
    assert torch.equal(model.embed_text(TEXTS), vectors[1])
    assert torch.equal(supclap.load(out / "run").embed_text(TEXTS), vectors[1])
    assert selection_note(out / "run") == {"selected_on": "test"}


def test_nothing_of_this_machine_is_in_it(manifest, run, folder, tmp_path):
    audio_folder("whisper", tmp_path / "w")
    other = hub_run(manifest, tmp_path, audio=tmp_path / "w", text=bert_folder(tmp_path / "b"))
    out = tmp_path / "out"
    assert main(["export", str(other), "--to", "hub", "--out", str(out)]) == 0
    graphs = tmp_path / "graphs"
    assert main(["export", str(other), "--to", "onnx", "--out", str(graphs)]) == 0
    here = str(Path(supclap.__file__).parent)
    private = [str(manifest.parent), str(run.parent), str(tmp_path), str(Path.home()), here]
    for path in [*folder.rglob("*"), *out.rglob("*"), *graphs.rglob("*")]:
        if path.is_file():
            held = path.read_bytes()
            assert not any(name.encode() in held for name in private), path
    settings = json.loads((out / "run" / "config.json").read_text())
    assert settings["model"]["audio_encoder"] == "hf:w" and settings["data"] == "clips.csv"
    for name, kept in (("org/model", "org/model"), ("client/acme/bert", "bert"), ("./b", "b")):
        config = replace(SMALL, text_encoder=f"hf:{name}")
        shared = shareable(replace(read_config(run), model=config))
        assert shared.model.text_encoder == f"hf:{kept}"
    kept = load_model(folder / "run").state_dict()
    assert kept.keys() == load_model(run).state_dict().keys()


def test_no_run(tmp_path, capsys):
    for to in ("hub", "onnx"):
        assert main(["export", str(tmp_path), "--to", to, "--out", str(tmp_path / "out")]) == 2
        assert "is not a run" in capsys.readouterr().err
