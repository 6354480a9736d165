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
from supclap.config import read_config
from supclap.exports.folder import shareable
from supclap.exports.onnx import WITHIN
from supclap.model import load_model, save_model, selection_note
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


# -------------------------------------------------------------------------------------------- ONNX


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


def test_results_are_of_these_weights(run, encoder, tmp_path, corpus):
    """MTEB files them by name and revision; other weights under the same name have another."""
    import shutil

    from supclap.exports.mteb import MtebEncoder

    shutil.copytree(run, tmp_path / "run")
    same = MtebEncoder(tmp_path / "run", device="cpu").mteb_model_meta
    meta = encoder.mteb_model_meta
    assert meta.name == same.name == "supclap/run" and meta.revision == same.revision
    model = load_model(run)
    with torch.no_grad():
        model.log_scale += 1.0
    save_model(tmp_path / "run" / "model.safetensors", model, {"selected_on": "test"})
    other = MtebEncoder(tmp_path / "run", device="cpu").mteb_model_meta.revision
    assert other[:16] != meta.revision[:16] and other.endswith("-selected-on-test")


def test_the_language_of_a_task():
    from supclap.exports.mteb import language_of

    class Task:
        hf_subsets_to_langscripts = {"fr": ["fra-Latn"], "zxx": ["zxx-Zxxx"]}

    assert [language_of(Task, name) for name in ("fr", "zxx", "other")] == ["fra", "eng", "eng"]
