"""Tables with tabs, other columns, Parquet, labelled clips, splits that share something."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from clips import WORDS, log_of, settings
from safetensors import safe_open
from supclap import parquet
from supclap.check import check
from supclap.cli import main
from supclap.corpus import load_corpus
from supclap.errors import UserError
from supclap.labels import is_labelled
from supclap.leaks import leaks
from supclap.manifest import read_manifest
from supclap.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def texts_of(clips):
    return [(clip.name, clip.captions, clip.languages) for clip in clips]


@pytest.mark.parametrize("column", ["file_name", "audio", "path", "wav", "filename"])
def test_a_file_by_any_usual_column(manifest, column):
    table = manifest.with_name("other.csv")
    table.write_text(manifest.read_text().replace("file_name", column, 1))
    assert texts_of(read_manifest(table)) == texts_of(read_manifest(manifest))
    assert check(table)[1] == []


def test_two_columns_of_files(manifest):
    """The usual one counts, and the other one is none of captions."""
    table = manifest.with_name("both.csv")
    table.write_text("path,file_name,caption\nno.wav,dog.wav,a dog\n")
    assert [clip.name for clip in read_manifest(table)] == ["dog.wav"]


def test_tabs_for_commas(manifest):
    table = manifest.with_name("m.tsv")
    rows = ["file_name\tcaption\tcaption_fr"]
    rows += [f'{word}.wav\ta {word}, close by\t"un ""{word}"""' for word in WORDS]
    table.write_text("\n".join(rows))
    clips = read_manifest(table)
    assert clips[0].captions == ("a dog, close by", 'un "dog"')
    assert clips[0].languages == ("eng", "fra") and len(clips) == 9
    table.write_text("file_name\tcaption\ndog.wav\ta dog\tone too many\n")
    with pytest.raises(UserError, match="line 2 .*more fields"):
        read_manifest(table)


# ----------------------------------------------------------------------------------------- Parquet


def write_parquet(manifest, path, inside=True, **columns):
    """As `datasets` writes an Audio column, in row groups of four."""
    files = [manifest.parent / f"{word}.wav" for word in WORDS]
    audio = [str(file) for file in files]
    if inside:
        audio = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = {"audio": audio, "caption": [f"the sound of a {word}" for word in WORDS], **columns}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=4)
    return path


def test_audio_inside_of_parquet(manifest, tmp_path, monkeypatch):
    french = [None if n == 3 else f"un {word}" for n, word in enumerate(WORDS)]
    path = write_parquet(manifest, tmp_path / "m.parquet", caption_fr=french, number=range(9))
    clips = read_manifest(path)
    assert [clip.name for clip in clips] == [f"{word}.wav" for word in WORDS]
    assert clips[0].captions == ("the sound of a dog", "un dog") and len(clips[3].captions) == 1
    assert str(clips[8]) == f"{path}, {WORDS[8]}.wav (row 9)"
    expected = load_corpus(manifest, 30.0)
    for cache in ("memory", "off", str(tmp_path / "kept")):
        found = load_corpus(path, 30.0, cache=cache, workers=2)
        assert all(torch.equal(found.features(n), expected.features(n)) for n in range(9))
    assert check(path)[0][0] == "9 clips, 17 captions" and check(path)[1] == []
    assert "unused columns: number" in check(path)[0]
    run = train(settings(path, tmp_path / "run", val=path, epochs=1))
    assert len(log_of(run)) == 1
    groups, opened = [], parquet.opened
    monkeypatch.setattr(parquet, "opened", lambda path: groups.append(1) or opened(path))
    parquet.group_of.cache_clear()
    load_corpus(path, 30.0)
    assert len(groups) == 1 + 3  # for the captions, then each row group once


def test_a_row_for_each_caption(manifest, tmp_path):
    """Rows of the same bytes are one clip; of the same name alone they are not."""
    dog, rain = ((manifest.parent / f"{word}.wav").read_bytes() for word in ("dog", "rain"))
    rows = [
        (dog, "a.wav", "a dog"), (dog, "a.wav", "a hound"), (rain, "a.wav", "rain"),
        (rain, None, "more rain"), (rain, None, "other rain"), (dog, "a.wav", "barks"),
    ]  # fmt: skip
    audio = [{"bytes": data, "path": name} for data, name, _ in rows]
    table = pyarrow.table({"audio": audio, "caption": [caption for *_, caption in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet", row_group_size=2)
    clips = read_manifest(tmp_path / "m.parquet")
    assert [clip.captions for clip in clips] == [
        ("a dog", "a hound", "barks"), ("rain",), ("more rain",), ("other rain",)
    ]  # fmt: skip


def test_a_damaged_page(manifest, tmp_path):
    path = write_parquet(manifest, tmp_path / "m.parquet")
    stored = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    start = stored.dictionary_page_offset or stored.data_page_offset
    raw[start : start + 60] = b"\xff" * 60
    path.write_bytes(raw)
    parquet.group_of.cache_clear()
    clips = load_corpus(path, 30.0, skip_bad_audio=True)
    assert len(clips.clips) == 5 and "the row cannot be read" in clips.skipped[0]
    assert len(check(path)[1]) == 4


def test_several_files_of_parquet(manifest, tmp_path):
    for n in range(2):
        write_parquet(manifest, tmp_path / f"part-0{n}.parquet")
    clips = read_manifest(tmp_path / "part-{00..01}.parquet")
    assert len(clips) == 18
    assert len(load_corpus(tmp_path / "part-{00..01}.parquet", 30.0).kept) == 18


def test_names_of_files_in_parquet(manifest, tmp_path):
    path = write_parquet(manifest, tmp_path / "m.parquet", inside=False)
    found, expected = load_corpus(path, 30.0), load_corpus(manifest, 30.0)
    assert all(map(torch.equal, found.kept, expected.kept))


def test_what_is_wrong_with_parquet(manifest, tmp_path, monkeypatch):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot read the manifest .*no Parquet file"):
        read_manifest(tmp_path / "broken.parquet")
    with pytest.raises(UserError, match="manifest not found"):
        read_manifest(tmp_path / "none.parquet")
    audio = [{"bytes": None, "path": "a.wav"}, {"bytes": b"no audio", "path": None}]
    table = pyarrow.table({"audio": audio, "caption": ["x", "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    _, problems = check(tmp_path / "m.parquet")
    assert "row 1 (a.wav): the row has no audio" in problems[0]
    assert "row 2 (row-2): not readable as audio" in problems[1]
    table = pyarrow.table({"audio": audio, "title": ["x", "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"row 1 \(a.wav\): no caption"):
        read_manifest(tmp_path / "m.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="supclap-kernels\\[parquet\\]"):
        read_manifest(tmp_path / "m.parquet")


# ------------------------------------------------------------------------------------------ labels


@pytest.fixture
def labelled(manifest, tmp_path):
    """ESC-50's layout."""
    folder = tmp_path / "esc"
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    rows = ["filename,fold,target,category"]
    for n, word in enumerate(WORDS):
        wave = (manifest.parent / f"{word}.wav").read_bytes()
        (folder / "audio" / f"{word}.wav").write_bytes(wave)
        rows.append(f"{word}.wav,{1 + n % 5},{n % 4},label_{n % 4}")
    (folder / "meta/esc50.csv").write_text("\n".join(rows))
    return folder


def test_labelled_clips_are_described(labelled, manifest, tmp_path, capsys):
    table = manifest.with_name("labels.tsv")
    table.write_text("file_name\tlabel\ndog.wav\tdog\nrain.wav\train\n")
    assert is_labelled(labelled) and is_labelled(table)
    both, neither = manifest.with_name("both.csv"), manifest.with_name("neither.csv")
    both.write_text("file_name,caption,label\ndog.wav,a dog,dog\n")
    neither.write_text("file_name,number\ndog.wav,1\n")
    for other in (manifest, manifest.parent, tmp_path / "none.csv", both, neither):
        assert not is_labelled(other)
    assert main(["check", str(labelled)]) == 0
    printed = capsys.readouterr().out
    assert "9 clips, 4 labels\nclips of a label: 2 to 3\nseconds:" in printed
    assert main(["check", str(table)]) == 0
    (labelled / "audio/rain.wav").unlink()
    assert main(["check", str(labelled)]) == 1
    assert "no such file" in capsys.readouterr().out


def test_labelled_clips_are_embedded(labelled, manifest, tmp_path):
    run, out = train(settings(manifest, tmp_path / "run", epochs=1)), tmp_path / "e.safetensors"
    command = ["embed", str(run), "--data", str(labelled), "--out", str(out)]
    assert main(command) == 0
    with safe_open(out, "pt") as stored:
        assert list(stored.keys()) == ["audio"] and stored.get_tensor("audio").shape == (9, 32)
        labels = json.loads(stored.metadata()["labels"])
        assert labels == [f"label {n % 4}" for n in range(9)]
    assert main([*command, "--only", "text"]) == 2


# -------------------------------------------------------------------------------------------- leaks


def test_splits_that_share_something(manifest, tmp_path, capsys):
    first, second = manifest.with_name("a.csv"), manifest.with_name("b.csv")
    rows = [f"{word}.wav,the sound of a {word}" for word in WORDS]
    first.write_text("\n".join(["file_name,caption", *rows[:5]]))
    second.write_text("\n".join(["file_name,caption", *rows[5:]]))
    assert main(["check", str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert f"{first}:\n5 clips" in printed and f"{second}:\n4 clips" in printed
    shared = [*rows[5:], "crowd.wav,The sound of a dog.", rows[0].replace("the", "another")]
    second.write_text("\n".join(["file_name,caption", *shared]))
    assert main(["check", str(first), str(second)]) == 1
    printed = capsys.readouterr().out
    assert "has the caption 'The sound of a dog.'" in printed and "dog.wav" in printed
    assert "sounds like" in printed and printed.rstrip().endswith("2 problems")
    labels = manifest.with_name("labels.csv")
    labels.write_text("file_name,label\ndog.wav,dog\n")
    for one, other in ((first, labels), (labels, first)):
        assert main(["check", str(one), str(other)]) == 1
        assert "sounds like" in capsys.readouterr().out


def test_a_leak_into_parquet(manifest, tmp_path):
    path = write_parquet(manifest, tmp_path / "m.parquet")
    found = leaks(read_manifest(manifest), read_manifest(path))
    assert len(found) == 9 and all("sounds like" in line for line in found)
