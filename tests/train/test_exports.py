"""Runs in the forms of other libraries: transformers, sentence-transformers, ONNX, MTEB."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import supclap
import torch
from clips import SMALL, WORDS, near, settings
from supclap import hub_audio
from supclap.cli import main
from supclap.exports.onnx import WITHIN
from supclap.model import load_model, selection_note
from supclap.train import train
from test_encoders import clap_folder, sonar_folder, word_tokenizer
from test_hub_encoders import TINY, audio_folder

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["the sound of a dog", "we hear rain close by", "glass"]


@pytest.fixture(scope="module")
def run(manifest, tmp_path_factory):
    torch.set_num_threads(1)
    options = {"epochs": 4, "batch_size": 9, "val": manifest, "svr": "bi-dynamic"}
    return train(settings(manifest, tmp_path_factory.mktemp("runs") / "run", **options))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "folder"
    assert main(["export", str(run), "--to", "hub", "--out", str(out)]) == 0
    return out


def sounds(manifest):
    return [str(manifest.with_name(f"{word}.wav")) for word in ("dog", "rain", "glass")]


def hub_run(manifest, folder, **encoders):
    """Selected on a test set."""
    model = replace(SMALL, **{f"{kind}_encoder": f"hf:{path}" for kind, path in encoders.items()})
    options = {"epochs": 1, "test": manifest, "select_on": "test"}
    return train(settings(manifest, folder / "run", model=model, **options))


def bert_folder(folder):
    config = transformers.BertConfig(**TINY, vocab_size=64, max_position_embeddings=40)
    transformers.BertModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


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
    halved = transformers.AutoModel.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16
    )
    assert halved.model.text.head[0].weight.dtype is torch.bfloat16


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


def test_sentence_transformers_trains_and_saves_it(folder, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    model = st.SentenceTransformer(str(folder), trust_remote_code=True)
    tokens = model.preprocess(TEXTS)
    model(tokens)["sentence_embedding"][:, 0].sum().backward()
    head = model[0].model.text.head[0]
    assert head.weight.grad.abs().sum() > 0
    with torch.no_grad():
        head.bias += 1.0
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
    private = [str(manifest.parent), str(run.parent), str(tmp_path), str(Path.home())]
    for path in [*folder.rglob("*"), *out.rglob("*")]:
        if path.is_file():
            held = path.read_bytes()
            assert not any(name.encode() in held for name in private), path
    settings = json.loads((out / "run" / "config.json").read_text())
    assert settings["model"]["audio_encoder"] == "hf:w" and settings["data"] == "clips.csv"
    kept = load_model(folder / "run").state_dict()
    assert kept.keys() == load_model(run).state_dict().keys()


def test_no_run(tmp_path, capsys):
    for to in ("hub", "onnx"):
        assert main(["export", str(tmp_path), "--to", to, "--out", str(tmp_path / "out")]) == 2
        assert "is not a run" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- ONNX


def session(path):
    return pytest.importorskip("onnxruntime").InferenceSession(path)


def ran(path, **inputs):
    return torch.from_numpy(session(path).run(None, {k: v.numpy() for k, v in inputs.items()})[0])


def test_onnx_hears_and_reads_as_the_run(manifest, run, tmp_path, capsys):
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("of PyTorch") == 3
    model, said = supclap.load(run), json.loads((tmp_path / "onnx.json").read_text())
    assert (said["sample_rate"], said["dimensions"]) == (16_000, 32)
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
    run = hub_run(manifest, tmp_path, audio=tmp_path / "audio", text=bert_folder(tmp_path / "text"))
    out = tmp_path / "out"
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
    assert not (out / "features.onnx").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "tokenizer")
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
    assert not (tmp_path / "out" / "onnx.json").exists()


def test_a_wrong_graph_is_an_error(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("supclap.exports.onnx.WITHIN", 0.0)
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path)]) == 2
    assert "differs from PyTorch" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- MTEB


@pytest.fixture(scope="module")
def corpus(manifest):
    """As the hub has it: an Audio column with the bytes of files."""
    pytest.importorskip("mteb")
    from datasets import Audio, Dataset

    files = [manifest.with_name(f"{word}.wav") for word in WORDS]
    rows = {
        "index": [str(n) for n in range(9)],
        "audio": [{"bytes": path.read_bytes(), "path": path.name} for path in files],
        "text": [[f"the sound of a {w}", f"we hear a {w} close by"] for w in WORDS],
        "target": list(range(9)),
    }  # fmt: skip
    return Dataset.from_dict(rows).cast_column("audio", Audio())


@pytest.fixture(scope="module")
def encoder(run):
    mteb = pytest.importorskip("mteb")
    from supclap.exports.mteb import MtebEncoder

    made = MtebEncoder(run, device="cpu")
    assert isinstance(made, mteb.EncoderProtocol)
    return made


def test_a_retrieval_task_of_mteb(manifest, run, corpus, encoder, monkeypatch, tmp_path):
    import mteb
    from datasets import Dataset

    task = mteb.get_task("ClothoA2TRetrieval.v2")
    monkeypatch.setattr(type(task), "load_data", lambda self, **_: None)
    texts = {f"{n}-{k}": text for n, two in enumerate(corpus["text"]) for k, text in enumerate(two)}
    sought = Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
    given = {
        "queries": corpus.select_columns(["index", "audio"]).rename_column("index", "id"),
        "corpus": sought,
        "relevant_docs": {str(n): {f"{n}-0": 1, f"{n}-1": 1} for n in range(9)},
        "top_ranked": None,
    }  # fmt: skip
    task.dataset, task.data_loaded = {"default": {"test": given}}, True
    cache = mteb.ResultCache(tmp_path)
    result = mteb.evaluate(encoder, task, cache=cache, encode_kwargs={"batch_size": 4})
    scores = result.task_results[0].scores["test"][0]
    model = supclap.load(run)
    audio = model.embed_audio([str(manifest.with_name(f"{word}.wav")) for word in WORDS])
    text = model.embed_text([text for texts in corpus["text"] for text in texts])
    nearest = (audio @ text.T).argsort(dim=1, descending=True) // 2
    for k in (1, 5):
        hit = (nearest[:, :k] == torch.arange(9)[:, None]).any(dim=1).float().mean().item()
        assert near(scores[f"hit_rate_at_{k}"], hit, within=1e-5)
    assert scores["hit_rate_at_1"] < 1.0


def test_a_zero_shot_task_of_mteb(manifest, run, corpus, encoder, monkeypatch, tmp_path):
    import mteb
    from datasets import DatasetDict

    task = mteb.get_task("ESC50_Zeroshot")
    monkeypatch.setattr(type(task), "load_data", lambda self, **_: None)
    task.dataset, task.data_loaded = DatasetDict({"train": corpus}), True
    result = mteb.evaluate(encoder, task, cache=mteb.ResultCache(tmp_path))
    model, labels = supclap.load(run), task.get_candidate_labels()
    audio = model.embed_audio([str(manifest.with_name(f"{word}.wav")) for word in WORDS])
    right = (audio @ model.embed_text(labels).T).argmax(dim=1) == torch.arange(9)
    assert near(result.task_results[0].scores["train"][0]["accuracy"], right.float().mean())


def test_rows_of_samples_and_of_both(manifest, run, corpus, encoder):
    """Samples without a file; text and audio together are their normalised sum."""
    from datasets import Dataset
    from torch.utils.data import DataLoader

    def encode(rows):
        loader = DataLoader(Dataset.from_dict(rows))
        given = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}
        return encoder.encode(loader, **given)

    wave, rate = soundfile.read(io.BytesIO(manifest.with_name("dog.wav").read_bytes()))
    sound = {"array": wave.tolist(), "sampling_rate": rate}
    model = supclap.load(run)
    audio = model.embed_audio(str(manifest.with_name("dog.wav")))
    assert near(encode({"audio": [sound]}).tolist(), audio.tolist())
    both = torch.nn.functional.normalize(audio + model.embed_text("a dog"), dim=1)
    assert near(encode({"audio": [sound], "text": ["a dog"]}).tolist(), both.tolist())
    with pytest.raises(ValueError, match="neither text nor audio"):
        encode({"image": [1]})
    vectors = model.embed_text(TEXTS).numpy()
    cosines = encoder.similarity(vectors, vectors)
    assert near(cosines.diagonal().tolist(), [1.0] * 3) and cosines.shape == (3, 3)
    pairs = encoder.similarity_pairwise(vectors, np.roll(vectors, 1, axis=0))
    assert near(pairs.tolist(), [float(cosines[n, n - 1]) for n in range(3)])


def test_the_language_of_a_task():
    from supclap.exports.mteb import language_of

    class Task:
        hf_subsets_to_langscripts = {"fr": ["fra-Latn"], "zxx": ["zxx-Zxxx"]}

    assert [language_of(Task, name) for name in ("fr", "zxx", "other")] == ["fra", "eng", "eng"]
