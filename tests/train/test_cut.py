"""Audio that was cut off: bad when it is first read, whatever the format and whatever is read."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
from clips import log_of
from supclap.audio import examine, read_duration
from supclap.cli import main
from supclap.corpus import load_corpus
from supclap.errors import UserError
from supclap.mp3 import bit_rates

RATE = 16_000
TINY = ["--width", "16", "--heads", "1", "--audio-layers", "1", "--text-layers", "1"]
FORMATS = {
    "wav": "WAV", "flac": "FLAC", "ogg": "OGG", "opus": "OGG", "mp3": "MP3", "aiff": "AIFF",
    "au": "AU", "w64": "W64", "caf": "CAF", "voc": "VOC",
}  # fmt: skip


def encoded(suffix, seconds=6.0, **more):
    """A file's bytes."""
    t = np.arange(int(RATE * seconds)) / RATE
    wave = 0.4 * np.sin(2 * np.pi * (300 + 50 * np.sin(t)) * t)
    wave += 0.05 * np.random.default_rng(0).standard_normal(len(t))
    stream = io.BytesIO()
    subtype = {"opus": "OPUS", "voc": "PCM_16"}.get(suffix)
    soundfile.write(stream, wave, RATE, format=FORMATS[suffix], subtype=subtype, **more)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_whole_file_is_whole_and_one_that_is_cut_is_not(tmp_path, suffix):
    whole = encoded(suffix)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(whole)
    name = str(path).encode()
    assert abs(read_duration(name) - 6.0) < 0.1 and abs(examine(name)[0] - 6.0) < 0.1
    for share in (0.9, 0.25):
        path.write_bytes(whole[: int(share * len(whole))])
        for look in (read_duration, examine):
            with pytest.raises(UserError, match="cut off|malformed|lost sync"):
                look(name)


def test_a_header_that_was_written_before_the_length_was_known(tmp_path):
    """As ffmpeg writes a WAV into a pipe."""
    raw = bytearray(encoded("wav"))
    for at in (4, raw.index(b"data") + 4):
        raw[at : at + 4] = b"\xff\xff\xff\xff"
    path = tmp_path / "a.wav"
    path.write_bytes(raw)
    assert read_duration(str(path).encode()) == 6.0


def test_a_length_that_nothing_says(tmp_path):
    """As ffmpeg writes a FLAC into a pipe: no number of frames."""
    raw = bytearray(encoded("flac"))
    raw[21] &= 0xF0
    raw[22:26] = b"\0\0\0\0"
    path = tmp_path / "a.flac"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="does not say how long it is"):
        read_duration(str(path).encode())


def untagged(raw):
    """An MP3 without the header that says its length: that is a frame of its own, where it fits."""
    tags = [raw.find(name, 0, 4000) for name in (b"Info", b"Xing")]
    start = 0
    if max(tags) > 0:
        start = raw.index(b"\xff", max(tags))
        while raw[start + 1] & 0xE0 != 0xE0:
            start = raw.index(b"\xff", start + 1)
    assert b"Info" not in raw[start:4000] and b"Xing" not in raw[start:4000]
    return raw[start:]


def test_an_mp3_that_promises_nothing(tmp_path):
    """Its length is guessed: it is not called cut, and every crop is inside what is there."""
    raw = untagged(encoded("mp3", 30.0, bitrate_mode="CONSTANT", compression_level=0.99))
    assert len(bit_rates(raw)) == 1
    for name, content in (("a.mp3", raw), ("zeros.mp3", raw + bytes(900))):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "m.csv").write_text("file_name,caption\na.mp3,x\nzeros.mp3,y\n")
    assert main(["check", str(tmp_path / "m.csv")]) == 0
    clips = load_corpus(tmp_path / "m.csv", 2.0, cache="off")
    assert read_duration(str(tmp_path / "zeros.mp3").encode()) > 30.5  # which is not there
    lengths = {len(clips.features(clip, [seed])) for clip in range(2) for seed in range(60)}
    assert lengths == {201}
    (tmp_path / "zeros.mp3").write_bytes(raw + bytes(40_000))  # more than the decoder skips
    with pytest.raises(UserError, match=r"zeros.mp3 \(line 3\): not readable as audio"):
        load_corpus(tmp_path / "m.csv", 2.0, cache="off")


def test_an_mp3_whose_length_cannot_even_be_guessed(tmp_path):
    """The library would take it for as long as its first frame's bit rate makes it."""
    tagged = encoded("mp3", 30.0, bitrate_mode="VARIABLE", compression_level=0.5)
    raw = untagged(tagged)
    assert len(bit_rates(raw)) > 1
    (tmp_path / "a.mp3").write_bytes(raw)
    with pytest.raises(UserError, match="its bit rate varies"):
        read_duration(str(tmp_path / "a.mp3").encode())
    picture = b"ID3\x04\0\0" + bytes([0, 12, 0, 0]) + b"\x89PNG" + bytes((12 << 14) - 4)
    (tmp_path / "a.mp3").write_bytes(picture + tagged)
    assert abs(read_duration(str(tmp_path / "a.mp3").encode()) - 30.0) < 0.1
    (tmp_path / "a.mp3").write_bytes(tagged)
    assert abs(read_duration(str(tmp_path / "a.mp3").encode()) - 30.0) < 0.1


@pytest.mark.parametrize("suffix", ["ogg", "opus"])
def test_what_follows_the_last_page_is_no_cut(tmp_path, suffix):
    whole = encoded(suffix)
    path = tmp_path / f"a.{suffix}"
    for more in (b"\n", b"TAG" + bytes(125), bytes(3000)):
        path.write_bytes(whole + more)
        assert abs(examine(str(path).encode())[0] - 6.0) < 0.1
    for missing in (1, 10, 400):  # within the last page
        path.write_bytes(whole[:-missing])
        with pytest.raises(UserError, match="cut off"):
            examine(str(path).encode())


def test_a_wav_whose_tags_are_lost_is_whole(tmp_path):
    raw = encoded("wav")
    size = len(raw) + 4000 - 8
    (tmp_path / "a.wav").write_bytes(raw[:4] + size.to_bytes(4, "little") + raw[8:])
    assert read_duration(str(tmp_path / "a.wav").encode()) == 6.0


def test_sphere_says_how_many_samples(tmp_path):
    path = tmp_path / "a.sph"
    soundfile.write(path, np.zeros(RATE * 6), RATE, format="NIST")
    whole = path.read_bytes()
    assert read_duration(str(path).encode()) == 6.0
    path.write_bytes(whole[: len(whole) // 4])
    if b"sample_count -i" in whole[:1024]:
        with pytest.raises(UserError, match="cut off: .* of the 96000 samples"):
            read_duration(str(path).encode())


def test_a_format_that_cannot_be_searched_is_not_called_cut(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(8_000 * 3), 8_000, subtype="GSM610")
    with pytest.raises(UserError, match="cannot search"):
        read_duration(str(path).encode())


@pytest.fixture
def corpus(tmp_path):
    """Four whole clips and one cut to a quarter, each longer than what is heard of it."""
    rows = ["file_name,caption"]
    for n, suffix in enumerate(("mp3", "mp3", "flac", "wav", "ogg")):
        raw = encoded(suffix)
        (tmp_path / f"{n}.{suffix}").write_bytes(raw[: len(raw) // 4] if n == 1 else raw)
        rows.append(f"{n}.{suffix},sound number {n}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    return tmp_path / "m.csv"


@pytest.mark.parametrize("cache", ["memory", "off", "folder"])
def test_a_cut_clip_is_bad_when_it_is_first_read(corpus, tmp_path, cache):
    cache = str(tmp_path / "kept") if cache == "folder" else cache
    with pytest.raises(UserError, match=r"1\.mp3 \(line 3\): it is cut off"):
        load_corpus(corpus, 1.0, cache=cache)
    whole = load_corpus(corpus, 1.0, skip_bad_audio=True, cache=cache)
    assert [clip.name for clip in whole.clips] == ["0.mp3", "2.flac", "3.wav", "4.ogg"]
    assert len(whole.skipped) == 1 and "it is cut off" in whole.skipped[0]
    lengths = {len(whole.features(clip, [seed])) for clip in range(4) for seed in range(40)}
    assert lengths == {101}  # every crop of every clip is whole


def test_check_and_train_say_so(corpus, tmp_path, capsys):
    assert main(["check", str(corpus)]) == 1
    printed = capsys.readouterr().out
    assert "line 3 (1.mp3): it is cut off" in printed and printed.endswith("\n1 problem\n")
    assert "seconds: 6.00 to 6.00" in printed
    run = tmp_path / "run"
    arguments = ["train", "--data", str(corpus), "--out", str(run), "--epochs", "3", *TINY]
    arguments += ["--max-seconds", "1", "--cache", "off", "--batch-size", "2"]
    assert main(arguments) == 2
    assert "1.mp3 (line 3): it is cut off" in capsys.readouterr().err and not run.exists()
    assert main([*arguments, "--skip-bad-audio"]) == 0
    assert "skipped 1 bad audio file" in capsys.readouterr().out
    assert len(log_of(run)) == 6


def test_a_cut_clip_in_a_tar(tmp_path):
    raw = encoded("mp3")
    parts = {"a.mp3": raw[: len(raw) // 4], "a.json": json.dumps({"caption": "x"}).encode()}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert main(["check", str(tmp_path / "x.tar")]) == 1
    with pytest.raises(UserError, match="it is cut off"):
        load_corpus(tmp_path / "x.tar", 1.0)
