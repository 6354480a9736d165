"""A run among the models of MTEB."""

import io

import numpy as np
import pytest
import soundfile
import supclap
import torch
from clips import WORDS, near
from exports import TEXTS
from supclap.model import load_model, save_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


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
        hf_subsets_to_langscripts = {"fr": ["fra-Latn", "deu-Latn"], "zxx": ["zxx-Zxxx"]}

    assert [language_of(Task, name) for name in ("fr", "zxx", "other")] == ["fra", "eng", "eng"]
