"""The library in Python: `supclap.train`, `supclap.load`; embeddings in files, and searches."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import supclap
import torch
from clips import SMALL, WORDS, near, settings
from interface_cases import close
from safetensors import safe_open
from supclap import embeddings, saved
from supclap.cli import main
from supclap.config import MODEL, TRAIN, ModelConfig, TrainConfig
from supclap.corpus import load_corpus
from supclap.embeddings import embed_corpus
from supclap.errors import UserError
from supclap.exports.folder import export_folder
from supclap.interface import samples_of
from supclap.search import embed, search
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(manifest):
    return supclap.train(settings(manifest, manifest.parent / "run", epochs=1))


@pytest.fixture(scope="module")
def model(run):
    return supclap.load(run, device="cpu")


def sounds_of(manifest):
    return [manifest.parent / f"{word}.wav" for word in WORDS]


# ---------------------------------------------------------------------------------------- in Python


def test_whatever_is_imported_first():
    """`supclap.train` is the function and the module; without it nothing imports PyTorch."""
    lines = [
        "import sys, supclap; assert 'torch' not in sys.modules; assert callable(supclap.train)",
        "from supclap.train import train; import supclap; assert callable(supclap.train)",
        "import supclap; from supclap import train; from supclap.train import train as f",
        "import supclap; assert supclap.load.__doc__ and supclap.Embedder.embed_text.__doc__",
    ]
    for line in lines:
        subprocess.run([sys.executable, "-c", line], check=True, timeout=60)
    assert set(supclap.__all__) >= {"load", "train", "TrainConfig", "ModelConfig"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = supclap.nothing


def test_names_of_files_may_be_strings(manifest, tmp_path):
    config = supclap.TrainConfig(data=str(manifest), out=str(tmp_path / "run"), epochs=1)
    assert config.data == manifest and config.out == tmp_path / "run" and config.val is None


def test_vectors_are_those_of_the_corpus(manifest, model):
    text, audio = embed_corpus(model.model, load_corpus(manifest, 30.0))
    names = [str(path) for path in sounds_of(manifest)]
    found = model.embed_audio(names)
    assert found.shape == (9, model.width) == (9, 32) and torch.equal(found, audio)
    assert close(model.embed_audio(names[2]), audio[2:3], 1e-6)
    captions = [f"the sound of a {word}" for word in WORDS]
    assert close(model.embed_text(captions), text[::2], 1e-6)
    assert close(model.embed_text(captions[1], lang="fr"), text[2:3], 1e-6)
    assert close(model.similarity(captions, names), text[::2] @ audio.T, 1e-5)
    assert torch.equal(model.similarity(text, audio), text @ audio.T)
    assert model.embed_audio([]).shape == (0, 32) == model.embed_text([]).shape


def test_samples_are_heard_as_files_are(manifest, tmp_path, model):
    waves = [soundfile.read(path, dtype="float32") for path in sounds_of(manifest)[::4]]
    expected = model.embed_audio(sounds_of(manifest)[::4])
    for (wave, rate), row in zip(waves, expected, strict=True):
        stereo = np.stack([wave, wave], axis=1)
        for samples in (wave, torch.from_numpy(wave), stereo, wave.astype(np.float64)):
            assert close(model.embed_audio(samples, sample_rate=rate)[0], row, 1e-5)
        whole = (wave * 32768).round().clip(-32768, 32767).astype(np.int16)
        assert close(model.embed_audio([whole], sample_rate=rate)[0], row, 1e-2)
    long = np.random.default_rng(0).normal(size=40 * 8_000).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "long.wav", long, 8_000, subtype="FLOAT")
    found = model.embed_audio(long, sample_rate=8_000)
    assert close(found, model.embed_audio(tmp_path / "long.wav"), 1e-6)
    assert close(found, model.embed_audio(long[: 30 * 8_000], sample_rate=8_000), 1e-6)


def test_what_does_not_fit_is_told(manifest, tmp_path, model, run):
    (tmp_path / "no.wav").write_text("no audio")
    wave = np.zeros((2, 1000), dtype=np.float32)
    for call, error, text in (
        (lambda: model.embed_audio(wave[0]), TypeError, "sample_rate"),
        (lambda: model.embed_audio(wave, 8_000), ValueError, r"\[S, channels\]"),
        (lambda: model.embed_audio(wave[0] / 0, 8_000), supclap.UserError, "NaN"),
        (lambda: model.embed_audio(wave[0, :0], 8_000), supclap.UserError, "zero length"),
        (lambda: model.embed_audio([tmp_path / "no.wav"]), supclap.UserError, "not readable"),
        (lambda: model.embed_audio("missing.wav"), supclap.UserError, "no such file"),
        (lambda: model.embed_text(["a", " "]), supclap.UserError, "empty"),
        (lambda: model.embed_text("a", lang="nonsense"), ValueError, "no language"),
        (lambda: supclap.load(tmp_path), supclap.UserError, "is not a run"),
    ):
        with pytest.raises(error, match=text), np.errstate(all="ignore"):
            call()


# ------------------------------------------------------------------------------------ in files


def test_few_clips_are_in_memory_at_a_time(manifest, monkeypatch, model):
    every = model.embed_audio(sounds_of(manifest))
    sizes, decode = [], embeddings.decode_clips
    monkeypatch.setattr(embeddings, "SLICE", 4)
    monkeypatch.setattr(
        embeddings,
        "decode_clips",
        lambda clips, *args: sizes.append(len(clips)) or decode(clips, *args),
    )
    assert close(model.embed_audio(sounds_of(manifest)), every, 1e-6) and sizes == [4, 4, 1]


@pytest.mark.parametrize("ending", saved.ENDINGS)
def test_a_folder_is_embedded_and_searched(manifest, run, model, tmp_path, capsys, ending):
    folder, out = tmp_path / "sounds", tmp_path / f"index{ending}"
    (folder / "deep").mkdir(parents=True)
    for word in WORDS:
        wave = (manifest.parent / f"{word}.wav").read_bytes()
        (folder / "deep" / f"{word}.wav").write_bytes(wave)
    (folder / "broken.wav").write_text("no audio")
    command = ["embed", str(run), "--data", str(folder), "--out", str(out), "--skip-bad-audio"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "9 clips and 0 captions" in printed and "broken.wav: not readable" in printed
    query = "the sound of a dog"
    hits = tmp_path / "hits.json"
    arguments = ["search", str(run), query, "--top", "4", "--json", str(hits)]
    found = []
    for among in (["--audio", str(folder)], ["--index", str(out)]):
        assert main([*arguments, *among]) == 0
        found.append(json.loads(hits.read_text()))
        assert len(found[-1]) == 4
    assert [x["file"] for x in found[0]] == [x["file"] for x in found[1]]
    scores = [[x["cosine"] for x in hits] for hits in found]
    assert near(*scores, within=1e-6)
    cosines = model.similarity(query, [folder / "deep" / f"{w}.wav" for w in sorted(WORDS)])[0]
    assert near(scores[1], cosines.sort(descending=True).values[:4].tolist(), within=1e-5)
    like, _ = search(run, manifest.parent / "rain.wav", top=50, index=out)
    assert len(like) == 9 and like[0][1] == "deep/rain.wav" and near(like[0][0], 1, within=1e-5)


@pytest.mark.parametrize("ending", saved.ENDINGS)
def test_an_index_of_other_weights(manifest, run, tmp_path, ending):
    out, sounds = tmp_path / f"index{ending}", tmp_path / "sounds"
    sounds.mkdir()
    (sounds / "dog.wav").write_bytes((manifest.parent / "dog.wav").read_bytes())
    embed(run, sounds, out)
    other = train(settings(manifest, tmp_path / "other", init=run, epochs=1))
    with pytest.raises(UserError, match="other weights wrote it than those of .*other; write it"):
        search(other, "a dog", index=out)
    export_folder(run, tmp_path / "exported")
    assert search(tmp_path / "exported/run", "a dog", index=out)[0][0][1] == "dog.wav"


def test_an_index_without_a_mark_of_its_weights(run, model, tmp_path):
    """As earlier versions wrote them, and other programs do."""
    vectors = model.embed_text(["a dog", "rain"])
    saved.Saved(audio=vectors, files=["dog.wav", "rain.wav"]).write(tmp_path / "a.safetensors")
    assert search(run, "rain", index=tmp_path / "a.safetensors")[0][0][1] == "rain.wav"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("none.npy", "none.npy: no such file"),
        ("bare.npy", "bare.npy.json, which names what its vectors are of, is missing"),
        ("lines.npy", "it names no files; `supclap embed` writes an index"),
        ("lines.safetensors", "it names no files; `supclap embed` writes an index"),
        ("list.npy", "list.npy.json holds no object"),
        ("list.npy.json", "known endings are .safetensors"),
    ],
)
def test_what_is_no_index(run, tmp_path, name, expected):
    (tmp_path / "lines.txt").write_text("a dog\n")
    for ending in (".npy", ".safetensors"):
        embed(run, tmp_path / "lines.txt", tmp_path / f"lines{ending}")
    for unnamed in ("bare.npy", "list.npy"):
        np.save(tmp_path / unnamed, np.zeros((2, 32), dtype=np.float32))
    (tmp_path / "list.npy.json").write_text('["a", "b"]')
    with pytest.raises(UserError, match=expected):
        search(run, "a dog", index=tmp_path / name)


def test_sentences_are_strings(model):
    with pytest.raises(TypeError, match=r"captions must be strings, got \[3\]"):
        model.embed_text([3])


def test_every_setting_is_explained_in_python():
    for name, setting in (TRAIN | MODEL).items():
        of = TrainConfig if name in TRAIN else ModelConfig
        assert f"    {name}: {setting.metadata['help']}" in of.__doc__
    assert "none, uni-static, bi-static, uni-dynamic, bi-dynamic" in TrainConfig.__doc__


def test_every_missing_file_is_named(model, tmp_path):
    names = [tmp_path / f"{n}.wav" for n in range(3)]
    with pytest.raises(UserError, match="no such file: .*0.wav, .*1.wav, .*2.wav"):
        model.embed_audio(names)
    with pytest.raises(UserError, match="no such file"):
        model.embed_audio("x" * 300)


def test_what_is_written(manifest, run, model, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("a dog\n\n  ein Hund \n")
    embed(run, tmp_path / "lines.txt", tmp_path / "t.safetensors", language="deu")
    with safe_open(tmp_path / "t.safetensors", "pt") as stored:
        assert list(stored.keys()) == ["text"]
        assert json.loads(stored.metadata()["captions"]) == ["a dog", "ein Hund"]
        assert json.loads(stored.metadata()["languages"]) == ["deu", "deu"]
        assert torch.equal(stored.get_tensor("text"), model.embed_text(["a dog", "ein Hund"]))
    for only, count in (("audio", 9), ("text", 18)):
        out = tmp_path / f"{only}.npy"
        assert (
            main(["embed", str(run), "--data", str(manifest), "--out", str(out), "--only", only])
            == 0
        )
        assert np.load(out).shape == (count, 32)
        names = json.loads((tmp_path / f"{out.name}.json").read_text())
        assert len(names["files" if only == "audio" else "captions"]) == count
        assert names["run"] == str(run) and ("languages" in names) == (only == "text")
    capsys.readouterr()
    for arguments, expected in (
        (["--data", manifest, "--out", tmp_path / "x.npy"], "--only audio or --only text"),
        (["--data", manifest, "--out", tmp_path / "x.csv"], "known endings are .safetensors"),
        (["--data", manifest.parent, "--out", tmp_path / "x.npy", "--only", "text"], "has none"),
        (["--data", tmp_path / "lines.txt", "--out", tmp_path / "x.npy", "--only", "audio"],
         "has none"),
        (["--data", tmp_path / "none", "--out", tmp_path / "x.safetensors"], "not found"),
    ):  # fmt: skip
        assert main(["embed", str(run), *map(str, arguments)]) == 2
        assert expected in capsys.readouterr().err
    for arguments, expected in (
        (["--index", tmp_path / "text.npy"], "search for a sentence, or"),
        (["x", "--index", tmp_path / "text.npy"], "no embeddings of audio"),
        (["x", "--index", tmp_path / "none.safetensors"], "no such file"),
        (["x", "--index", tmp_path / "t.safetensors"], "no embeddings of audio"),
    ):
        assert main(["search", str(run), *map(str, arguments)]) == 2
        assert expected in capsys.readouterr().err
    np.save(tmp_path / "other.npy", np.zeros((9, 16), dtype=np.float32))
    (tmp_path / "other.npy.json").write_text((tmp_path / "audio.npy.json").read_text())
    assert main(["search", str(run), "x", "--index", str(tmp_path / "other.npy")]) == 2
    assert "it has 16 dimensions" in capsys.readouterr().err


def test_names_stand_beside_each_file(manifest, run, tmp_path, capsys):
    """Two files of one stem, and a manifest that is called as they are."""
    table = [{"audio": str(path), "captions": [path.stem]} for path in sounds_of(manifest)]
    (tmp_path / "a.json").write_text(json.dumps(table))
    (tmp_path / "one").mkdir()
    (tmp_path / "one/dog.wav").write_bytes((manifest.parent / "dog.wav").read_bytes())
    embed(run, tmp_path / "a.json", tmp_path / "a.npy", only="audio")
    embed(run, tmp_path / "one", tmp_path / "a.faiss")
    assert json.loads((tmp_path / "a.json").read_text()) == table
    assert len(search(run, "a dog", index=tmp_path / "a.npy")[0]) == 9
    assert search(run, "a dog", index=tmp_path / "a.faiss")[0][0][1] == "dog.wav"
    (tmp_path / "a.npy.json").write_text((tmp_path / "a.faiss.json").read_text())
    assert main(["search", str(run), "a dog", "--index", str(tmp_path / "a.npy")]) == 2
    assert "9 vectors and 1 names" in capsys.readouterr().err


def test_a_row_for_each_sound(manifest, run, tmp_path):
    (tmp_path / "no.wav").write_text("no audio")
    model = supclap.Embedder(run, embeddings.EmbedOptions(skip_bad_audio=True))
    with pytest.raises(supclap.UserError, match="1 of 2 audio files"):
        model.embed_audio([sounds_of(manifest)[0], tmp_path / "no.wav"])


def test_integers_of_full_scale():
    for dtype, values in ((np.uint8, [0, 128, 192]), (np.int16, [-32768, 0, 16384])):
        assert near(samples_of(np.array(values, dtype=dtype)), [-1.0, 0.0, 0.5])


def test_without_faiss(run, manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    out = str(tmp_path / "x.faiss")
    assert main(["embed", str(run), "--data", str(manifest), "--out", out, "--only", "audio"]) == 2
    assert "pip install faiss-cpu" in capsys.readouterr().err


def test_the_width_without_heads(manifest):
    from supclap.config import ModelConfig
    from supclap.model import SupclapModel

    assert SupclapModel(SMALL).width == 32
    assert SupclapModel(ModelConfig(width=64, heads=2, head="none", embed_dim=8)).width == 64
