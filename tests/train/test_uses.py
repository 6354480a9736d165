"""What a trained run is for: retrieval by language, zero-shot, embeddings, search."""

import json

import numpy as np
import pytest
import soundfile
import torch
from clips import SMALL, WORDS, log_of, near, settings
from safetensors import safe_open
from supclap.cli import main
from supclap.config import ModelConfig
from supclap.corpus import load_corpus
from supclap.embeddings import embed_corpus, embed_text
from supclap.errors import UserError
from supclap.evaluate import evaluate_corpus, evaluate_run, retrieval_metrics
from supclap.model import SupclapModel, load_model
from supclap.train import train
from supclap.zeroshot import accuracies, class_vectors, labelled_clips

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(manifest):
    """Knows its clips by heart."""
    config = settings(manifest, manifest.parent / "run", epochs=60, lr=3e-3, model=ModelConfig())
    return train(config)


def test_each_language_is_measured_by_itself(manifest, tmp_path, capsys, run):
    (tmp_path / "audio").mkdir()
    lines = []
    for n, word in enumerate(WORDS):
        (tmp_path / "audio" / f"{word}.wav").write_bytes(
            (manifest.parent / f"{word}.wav").read_bytes()
        )
        captions = {"eng": [f"the sound of a {word}", f"we hear a {word} close by"]}
        if n < 5:
            captions["fra"] = [f"le bruit de {word}"]  # the other clips have no caption of it
        lines.append(json.dumps({"audio": f"{word}.wav", "captions": captions}))
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(lines))
    metrics, corpus = evaluate_run(run, path)
    assert set(metrics["languages"]) == {"eng", "fra"}
    text, audio = embed_corpus(load_model(run), corpus)
    for language, numbers in metrics["languages"].items():
        rows = torch.tensor([spoken == language for spoken in corpus.languages])
        assert numbers == retrieval_metrics(text[rows], audio, corpus.clip_of[rows])
    for way in ("t2a", "a2t"):
        for name, value in metrics[way].items():
            pair = [metrics["languages"][language][way][name] for language in ("eng", "fra")]
            assert near(value, sum(pair) / 2)
    assert metrics["languages"]["eng"]["t2a"]["R@1"] >= 0.9
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(path), str(manifest)]) == 0
    printed = capsys.readouterr().out
    assert "mean of 2 languages" in printed and printed.count("median rank, text to audio") == 2


def by_brute_force(scores, clip_of):
    """scores [M, N], every rule spelled out."""
    M, N = scores.shape
    t2a, a2t, first = [], [], []
    for m in range(M):
        hits = scores[m, clip_of[m]]
        t2a.append(1 + sum(scores[m, n] >= hits for n in range(N) if n != clip_of[m]))
    for n in range(N):
        hits = sorted((scores[m, n] for m in range(M) if clip_of[m] == n), reverse=True)
        if not hits:
            continue
        others = [scores[m, n] for m in range(M) if clip_of[m] != n]
        ranks = [i + 1 + sum(other >= hit for other in others) for i, hit in enumerate(hits)]
        first.append(ranks[0])
        a2t.append(sum((i + 1) / rank for i, rank in enumerate(ranks) if rank <= 10) / len(hits))
    metrics = {}
    for way, ranks, precision in (
        ("t2a", t2a, [1 / rank if rank <= 10 else 0.0 for rank in t2a]),
        ("a2t", first, a2t),
    ):
        metrics[way] = {f"R@{k}": float(np.mean([rank <= k for rank in ranks])) for k in (1, 5, 10)}
        metrics[way]["mAP@10"] = float(np.mean(precision))
        metrics[way]["median_rank"] = float(np.floor(np.median(np.array(ranks) - 1)) + 1)
    return metrics


@pytest.mark.parametrize("seed", range(20))
def test_metrics_by_brute_force(seed):
    """Random scores with ties, clips without captions, uneven numbers of captions, any order."""
    rng = np.random.default_rng(seed)
    N = int(rng.integers(3, 30))
    counts = rng.integers(0, 6, N)
    counts[rng.integers(N)] = 3
    clip_of = rng.permutation(np.repeat(np.arange(N), counts))
    scores = rng.integers(0, 12 if seed % 2 else 200, (len(clip_of), N)).astype(float)
    # One-hot clips make the inner products the scores themselves.
    metrics = retrieval_metrics(torch.tensor(scores), torch.eye(N).double(), torch.tensor(clip_of))
    expected = by_brute_force(scores, clip_of)
    for way in ("t2a", "a2t"):
        for name, value in expected[way].items():
            assert near(metrics[way][name], value, within=1e-9), (way, name)


def test_batch_size_changes_no_number(manifest, run):
    model, corpus = load_model(run), load_corpus(manifest, 30.0)
    expected = evaluate_corpus(model, corpus, 64)
    for rows in (1, 2, 5):
        assert evaluate_corpus(model, corpus, rows) == expected
    single, many = (torch.cat(embed_corpus(model, corpus, rows)) for rows in (1, 64))
    assert (single - many).abs().max() < 2e-6


def test_equal_captions_tie_whatever_they_are_beside(manifest, run):
    """A caption of two clips is encoded once: its tie counts against the model every time."""
    model = load_model(run)
    captions = ["the sound of a dog", "x", "a very much longer caption " * 4, "the sound of a dog"]
    encoded = []
    model.text.register_forward_hook(lambda _, inputs, vectors: encoded.append(len(vectors)))
    for rows in (1, 2, 64):
        vectors = embed_text(model, captions, ["eng"] * 4, rows)
        assert torch.equal(vectors[0], vectors[3]) and sum(encoded) == 3
        encoded.clear()


def test_selection_on_the_test_set_marks_everything(manifest, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", "--data", str(manifest), "--out", str(out), "--epochs", "2"]
    assert main([*arguments, "--select-on", "test"]) == 2
    assert "--select-on test needs --test MANIFEST" in capsys.readouterr().err
    assert main([*arguments, "--test", str(manifest)]) == 2
    assert "and --test is for nothing else" in capsys.readouterr().err
    shape = ["--width", "16", "--heads", "1", "--audio-layers", "1", "--text-layers", "1"]
    selection = ["--select-on", "test", "--test", str(manifest)]
    assert main([*arguments, *shape, *selection]) == 0
    assert "NOTE: the checkpoint is selected on the test set" in capsys.readouterr().out
    assert all(line["selected_on"] == "test" for line in log_of(out, "val"))
    report = tmp_path / "m.json"
    assert main(["eval", str(out), "--data", str(manifest), "--json", str(report)]) == 0
    assert "NOTE: this checkpoint was selected on a test set" in capsys.readouterr().out
    assert json.loads(report.read_text())["selected_on"] == "test"
    saved = tmp_path / "e.safetensors"
    assert main(["embed", str(out), "--data", str(manifest), "--out", str(saved)]) == 0
    with safe_open(saved, "pt") as stored:
        assert stored.metadata()["selected_on"] == "test"
    assert main(["search", str(out), "dog", "--audio", str(manifest.parent)]) == 0
    assert "selected on a test set" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- zero-shot


def test_zeroshot_of_memorised_sounds(manifest, run, tmp_path, capsys):
    rows = [f"{word}.wav,{word},{n % 2}" for n, word in enumerate(WORDS)]
    table = manifest.parent / "labels.csv"
    table.write_text("\n".join(["file_name,label,fold", *rows]))
    report = tmp_path / "z.json"
    templates = ["--template", "the sound of a {label}", "--template", "we hear a {label} close by"]
    arguments = ["zeroshot", str(run), "--data", str(table), "--json", str(report)]
    assert main([*arguments, *templates]) == 0
    printed, numbers = capsys.readouterr().out, json.loads(report.read_text())
    assert "9 clips, 9 classes" in printed and "a tie is wrong" in printed
    assert numbers["accuracy"] >= 8 / 9 and numbers["top5"] == 1.0
    assert set(numbers["folds"]) == {"0", "1"} and numbers["templates"] == templates[1::2]
    assert main(arguments) == 0
    assert "templates: This is a sound of {label}" in capsys.readouterr().out


def test_templates_are_averaged_on_the_sphere(run):
    model = load_model(run)
    a, b = "a {label}", "the {label} here"
    both = class_vectors(model, ["dog", "rain"], [a, b], "eng")
    parts = [class_vectors(model, ["dog", "rain"], [template], "eng") for template in (a, b)]
    expected = torch.nn.functional.normalize(parts[0] + parts[1], dim=1)
    assert (both - expected).abs().max() < 1e-6
    with pytest.raises(UserError, match="needs {label}"):
        class_vectors(model, ["dog"], ["no place"], "eng")


def test_accuracies_by_hand():
    scores = torch.tensor([[3.0, 1, 1], [2, 2, 0], [0, 1, 2], [5, 1, 0]])
    numbers = accuracies(scores, torch.tensor([0, 0, 2, 1]), ["1", "1", "2", "10"])
    assert near(numbers["accuracy"], 0.5) and near(numbers["top5"], 1.0)  # a tie is wrong
    assert near(numbers["mean_class_accuracy"], (0.5 + 0 + 1) / 3)
    assert numbers["folds"] == {"1": 0.5, "2": 1.0, "10": 0.0}
    assert near(numbers["mean_fold_accuracy"], 0.5)


def test_public_layouts(tmp_path):
    (tmp_path / "esc/meta").mkdir(parents=True)
    (tmp_path / "esc/meta/esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n1-1-A-0.wav,1,0,crying_baby,True,1,A\n"
    )
    clips, labels, folds = labelled_clips(tmp_path / "esc")
    assert clips[0].path == tmp_path / "esc/audio/1-1-A-0.wav"
    assert labels == ["crying baby"] and folds == ["1"]
    (tmp_path / "us/metadata").mkdir(parents=True)
    (tmp_path / "us/metadata/UrbanSound8K.csv").write_text(
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n1-3.wav,1,0,4,1,5,3,dog_bark\n"
    )
    clips, labels, folds = labelled_clips(tmp_path / "us")
    assert clips[0].path == tmp_path / "us/audio/fold5/1-3.wav"
    assert labels == ["dog bark"] and folds == ["5"]
    for column in ("audio", "path", "wav", "filename"):
        (tmp_path / "own.csv").write_text(f"{column},label\nx.wav,dog_bark\n")
        clips, labels, folds = labelled_clips(tmp_path / "own.csv")
        assert clips[0].path == tmp_path / "x.wav" and labels == ["dog bark"]
    (tmp_path / "none").mkdir()
    for data, text, expected in (
        ("none", None, "neither ESC-50"),
        ("gone.csv", None, "no such file"),
        ("a.csv", "file_name,class\nx,y\n", "no column 'label'; it has file_name, class"),
        ("b.csv", "file_name,label\nx,y\nz,\n", "line 3: label is empty"),
        ("e.csv", "", "e.csv is empty"),
        ("f.csv", "audio;label\nx;y\n", "commas separate the columns of a .csv"),
        ("d.csv", "file,label\nx,y\n", "no column of files \\(file_name, audio, path"),
        ("c.csv", "file_name,label\n", "a header and no clip"),
    ):
        if text is not None:
            (tmp_path / data).write_text(text)
        with pytest.raises(UserError, match=expected):
            labelled_clips(tmp_path / data)


# ------------------------------------------------------------------------------ embeddings, search


def test_embeddings_of_a_manifest(manifest, run, tmp_path, capsys):
    out = tmp_path / "e.safetensors"
    assert main(["embed", str(run), "--data", str(manifest), "--out", str(out)]) == 0
    assert "9 clips and 18 captions" in capsys.readouterr().out
    text, audio = embed_corpus(load_model(run), load_corpus(manifest, 30.0))
    with safe_open(out, "pt") as stored:
        assert torch.equal(stored.get_tensor("audio"), audio)
        assert torch.equal(stored.get_tensor("text"), text)
        assert stored.get_tensor("clip_of").tolist() == [n // 2 for n in range(18)]
        files = json.loads(stored.metadata()["files"])
        captions = json.loads(stored.metadata()["captions"])
    assert files == [f"{word}.wav" for word in WORDS] and len(captions) == 18


def test_search_finds_what_was_learned(manifest, run, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    for n, word in enumerate(WORDS):
        target = tmp_path / "deep" / f"{n}.wav"
        target.write_bytes((manifest.parent / f"{word}.wav").read_bytes())
    (tmp_path / "broken.wav").write_text("no audio")
    hits = 0
    for n, word in enumerate(WORDS):
        arguments = ["search", str(run), f"the sound of a {word}", "--audio", str(tmp_path)]
        assert main([*arguments, "--top", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "broken.wav: not readable" in lines[1] and lines[2].split() == [
            "rank", "cosine", "file"
        ]  # fmt: skip
        assert len(lines) == 5 and float(lines[3].split()[1]) >= float(lines[4].split()[1])
        hits += lines[3].split()[2] == f"deep/{n}.wav"
    assert hits >= 8
    (tmp_path / "empty").mkdir()
    for arguments, expected in (
        (["x", "--audio", str(tmp_path / "no")], "no such folder"),
        (["x", "--audio", str(tmp_path / "empty")], "holds no audio"),
        ([" ", "--audio", str(tmp_path)], "the query is empty"),
        (["x", "--audio", str(tmp_path), "--top", "0"], "--top must be at least 1"),
        (["x", "--audio", str(tmp_path), "--batch-size", "0"], "--batch-size must be at least 1"),
    ):
        assert main(["search", str(run), *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_a_silent_or_tiny_clip_has_an_embedding(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(10), 16_000)
    (tmp_path / "m.csv").write_text("file_name,caption\na.wav,x\n")
    model = SupclapModel(SMALL)
    text, audio = embed_corpus(model, load_corpus(tmp_path / "m.csv", 30.0))
    assert torch.isfinite(text).all() and torch.isfinite(audio).all()
