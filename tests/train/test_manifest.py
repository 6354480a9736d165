"""Every manifest format, and what is said of a bad one: which file, which line, what is wrong."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import soundfile
from supclap.audio import load_audio, open_audio
from supclap.cli import main
from supclap.corpus import load_corpus
from supclap.errors import UserError
from supclap.manifest import read_manifest, scan_manifest


def wave(seconds=0.3, rate=16_000, pitch=440.0):
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)


def written(folder, name, text):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def captions_by_file(clips):
    pairs = [(c.name, list(zip(c.captions, c.languages, strict=True))) for c in clips]
    return dict(pairs)


def test_clotho_with_any_number_of_columns_and_a_language(tmp_path):
    text = "file_name,caption_1,caption_2,lang\na b.c.wav,one,two,fra\nd.wav,three,four,\n"
    assert captions_by_file(read_manifest(written(tmp_path, "m.csv", text))) == {
        "a b.c.wav": [("one", "fra"), ("two", "fra")],
        "d.wav": [("three", "eng"), ("four", "eng")],
    }


@pytest.mark.parametrize("name, what", [("folder", "a folder"), ("a.flac", "a sound")])
def test_what_is_no_manifest(tmp_path, name, what):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(UserError, match=f"{name} is {what}, no manifest"):
        read_manifest(tmp_path / name)


def test_holes_of_every_kind(tmp_path):
    """null and NaN of JSON, and what tables write for them; a list may be padded."""
    holes = [None, float("nan"), "", " ", "nan", "None"]
    rows = [
        {"audio": f"{n}.wav", "caption": "one", "caption_2": hole, "hard_negative": hole}
        for n, hole in enumerate(holes)
    ]
    rows.append({"audio": "list.wav", "captions": ["one", None, float("nan")]})
    clips = read_manifest(written(tmp_path, "m.jsonl", "\n".join(map(json.dumps, rows))))
    text = "audio,caption,caption_2,hard_negative\n"
    text += "".join(f"{n}.wav,one,{hole},{hole}\n" for n, hole in enumerate(holes[2:]))
    clips += read_manifest(written(tmp_path, "m.csv", text))
    assert len(clips) == 11
    assert all(clip.captions == ("one",) and not clip.wrong for clip in clips)


def test_languages_of_a_list_with_holes(tmp_path):
    row = {"audio": "a.wav", "caption_1": "un", "caption_2": None, "caption_3": "drei"}
    path = written(tmp_path, "m.jsonl", json.dumps(row | {"lang": ["fra", "eng", "deu"]}))
    assert captions_by_file(read_manifest(path)) == {"a.wav": [("un", "fra"), ("drei", "deu")]}


def test_help_needs_no_library():
    code = (
        "import sys\nsys.modules['langcodes'] = sys.modules['numpy'] = None\n"
        "from supclap.cli import main\nmain(['check', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "hard_negative_2" in done.stdout, done.stderr


def test_clips_with_fewer_captions(tmp_path):
    text = "audio,caption,caption_2,caption_3\na.wav,one,,two\nb.wav,,three,\nc.wav,four, ,\n"
    rows = [
        {"audio": "a.wav", "caption": "one", "caption_2": None, "caption_3": "two"},
        {"audio": "b.wav", "caption": "", "caption_2": "three"},
        {"audio": "c.wav", "caption": "four"},
    ]
    lines = "\n".join(map(json.dumps, rows))
    for name, content in (("m.csv", text), ("m.jsonl", lines)):
        assert captions_by_file(read_manifest(written(tmp_path, name, content))) == {
            "a.wav": [("one", "eng"), ("two", "eng")],
            "b.wav": [("three", "eng")],
            "c.wav": [("four", "eng")],
        }


def test_one_caption_a_row(tmp_path):
    text = "file_name,caption\na.wav,one\nb.wav,two\na.wav,three\n"
    assert captions_by_file(read_manifest(written(tmp_path, "m.csv", text))) == {
        "a.wav": [("one", "eng"), ("three", "eng")],
        "b.wav": [("two", "eng")],
    }


def test_audiocaps_as_published(tmp_path):
    (tmp_path / "audio").mkdir()
    for name in ("audio/abc_30.flac", "Ydef.wav", "91139.mp3"):
        (tmp_path / name).touch()
    text = "audiocap_id,youtube_id,start_time,caption\n"
    text += "1,abc,30,one\n2,abc,30,two\n3,def,0,three\n91139,ghi,5,four\n5,gone,10,five\n"
    clips = read_manifest(written(tmp_path, "test.csv", text))
    paths = [clip.path.relative_to(tmp_path).as_posix() for clip in clips]
    assert paths == ["audio/abc_30.flac", "Ydef.wav", "91139.mp3", "gone_10"]
    assert clips[0].captions == ("one", "two")


def test_wavcaps_and_mlclap_json(tmp_path):
    (tmp_path / "180913.flac").touch()
    (tmp_path / "Yx.flac").touch()
    data = [
        {"id": 180913, "caption": "one", "duration": 1.0},
        {"id": "Yx.wav", "caption": ["two", "three"], "lang": "deu"},
        {"audio": "c.wav", "caption_1": "four", "caption_2": "five", "source_lang_2": "zho"},
    ]
    whole = {"num_captions_per_audio": 1, "data": data}
    assert captions_by_file(read_manifest(written(tmp_path, "m.json", whole))) == {
        "180913.flac": [("one", "eng")],
        "Yx.flac": [("two", "deu"), ("three", "deu")],
        "c.wav": [("four", "eng"), ("five", "zho")],
    }


def test_wavcaps_as_published(tmp_path):
    """Its "audio" is a word that stands for a path, its "file_name" a title."""
    (tmp_path / "9.flac").touch()
    (tmp_path / "take.wav").touch()
    data = [
        {"id": "9", "audio": "wav_path", "file_name": "UK Mello.wav", "caption": "one"},
        {"id": "10", "audio": "wav_path", "caption": "two"},
        {"audio": "", "id": "take.2", "caption": "three"},  # take.wav is another file
    ]
    clips = read_manifest(written(tmp_path, "m.json", {"data": data}))
    assert [clip.path.name for clip in clips] == ["9.flac", "10", "take.2"]


def test_jsonl_by_language(tmp_path):
    lines = [
        {"audio": "a.wav", "captions": ["one", "two"], "lang": ["eng", "fra"]},
        {"audio": "b.wav", "captions": {"spa": ["tres"], "cat": "quatre"}},
        {"audio": "c.wav", "captions": "five"},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    assert captions_by_file(read_manifest(written(tmp_path, "m.jsonl", text))) == {
        "a.wav": [("one", "eng"), ("two", "fra")],
        "b.wav": [("tres", "spa"), ("quatre", "cat")],
        "c.wav": [("five", "eng")],
    }


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def flac(pitch):
    stream = io.BytesIO()
    soundfile.write(stream, wave(pitch=pitch), 16_000, format="FLAC")
    return stream.getvalue()


def test_webdataset_tars(tmp_path):
    for shard in range(2):
        tar_of(
            tmp_path / f"x-{shard:03d}.tar",
            [
                (f"s{shard}/a.flac", flac(300.0 + shard)),
                (f"s{shard}/a.json", json.dumps({"captions": {"eng": ["one"]}}).encode()),
                (f"s{shard}/b.flac", flac(900.0)),
                (f"s{shard}/b.txt", b"two words\n"),
            ],
        )
    manifest = tmp_path / "x-{000..001}.tar"
    clips = read_manifest(manifest)
    assert [clip.name for clip in clips] == ["s0/a.flac", "s0/b.flac", "s1/a.flac", "s1/b.flac"]
    assert [clip.captions for clip in clips] == [("one",), ("two words",)] * 2
    heard = load_audio(open_audio(clips[2]), 30.0)
    assert np.abs(heard - wave(pitch=301.0)).max() < 1e-3
    corpus = load_corpus(manifest, 30.0)
    assert len(corpus.clips) == 4 and corpus.kept[0].shape == corpus.kept[2].shape


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("m.jsonl", '{"audio": "a.wav"}\n', "line 1 (a.wav): no caption"),
        ("m.jsonl", '\n{"audio": \n', "line 2: not JSON"),
        ("m.jsonl", '{"captions": "x"}\n', "line 1: no file: it needs audio, file_name or id"),
        ("m.jsonl", '["a.wav"]\n', "line 1: an object was expected"),
        ("m.jsonl", '{"audio": "a", "captions": ["x", ""]}\n', "line 1 (a): a caption is empty"),
        ("m.jsonl", '{"audio": "a", "captions": 3}\n', "captions must be a string"),
        (
            "m.jsonl",
            '{"audio": "a", "captions": ["x"], "lang": ["a", "b"]}',
            "1 captions and 2 languages",
        ),
        ("m.json", '{"data": [{"id": "a"}]}', "entry 1 (a): no caption"),
        ("m.json", '{"rows": []}', 'needs a list, or one under "data"'),
        ("m.json", "{", "cannot read the manifest"),
        ("m.json", '{"data": []}', "it has no clip"),
        ("m.csv", "youtube_id,start_time\nx,1\n", "has no column of captions"),
        ("m.csv", "audiocap_id,youtube_id,caption\n1,,x\n", "line 2: youtube_id is empty"),
        ("m.csv", "audio,caption,caption_2\na,x,y\nb,x", "line 3 (b): fewer fields"),
        ("m.csv", "audio,caption,caption_2\na.wav,,\n", "caption, caption_2 are empty"),
        ("m.csv", "audio,caption\na.wav,nan\n", "line 2 (a.wav): caption is empty"),
        ("m.jsonl", '{"audio": "a", "caption": null, "caption_2": null}', "caption_2 are empty"),
        ("m.jsonl", '{"audio": "a", "caption": null, "caption_fr": "un"}', "caption is empty"),
        ("m.tsv", "audio,caption\na.wav,x\n", "tabs those of a .tsv"),
        (f"{'x' * 300}.csv", None, "cannot read the manifest"),
        ("gone.wav", None, "manifest not found"),
        ("m.tar", "this is no tar at all", "cannot read the manifest"),
        ("gone-{0..1}.tar", None, "manifest not found"),
    ],
)
def test_a_bad_manifest_is_explained(tmp_path, name, text, expected):
    path = tmp_path / name if text is None else written(tmp_path, name, text)
    with pytest.raises(UserError) as error:
        read_manifest(path)
    assert expected in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_samples_of_a_tar_are_checked(tmp_path):
    members = [("a.json", b'{"caption": "x"}'), ("b.flac", flac(300.0)), ("c.flac", flac(300.0))]
    path = tar_of(tmp_path / "x.tar", [*members, ("c.json", b'{"caption": ')])
    with pytest.raises(UserError) as error:
        read_manifest(path)
    for expected in ("sample a: no audio", "sample b: no captions", "sample c: Expecting value"):
        assert expected in str(error.value)


def test_all_problems_are_told_but_not_too_many(tmp_path):
    path = written(tmp_path, "m.csv", "file_name,caption_1\n" + "a.wav,\n" * 25)
    with pytest.raises(UserError) as error:
        read_manifest(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 11 and lines[-1].strip() == "... and 15 more"
    assert len(scan_manifest(path)[1]) == 25


def test_check_describes_a_manifest_and_lists_every_problem(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", wave(1.0), 16_000)
    soundfile.write(tmp_path / "b.wav", wave(3.0, 44_100), 44_100)
    (tmp_path / "text.wav").write_text("no audio")
    rows = ["a.wav,one,eng", "b.wav,deux,fra", "gone.wav,x,eng", "text.wav,x,eng", "a.wav,one,eng"]
    path = written(tmp_path, "m.csv", "\n".join(["file_name,caption,lang", *rows, "c.wav,,eng"]))
    assert main(["check", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "4 clips, 5 captions" in printed and "captions of a clip: 1 to 2" in printed
    assert "languages: eng 4, fra 1" in printed
    assert "seconds: 1.00 to 3.00, median 2.00, 0.00 hours" in printed
    assert "sample rates: 16000 Hz 1, 44100 Hz 1" in printed
    for expected in (
        "line 7 (c.wav): caption is empty",
        "line 4 (gone.wav): no such file",
        "line 5 (text.wav): not readable as audio",
        "line 2 (a.wav): the caption 'one' is there 2 times",
        "4 problems",
    ):
        assert expected in printed, expected
    good = written(tmp_path, "good.csv", "file_name,caption\na.wav,one\n")
    assert main(["check", str(good)]) == 0
    assert "no problems" in capsys.readouterr().out
