"""Manifests and audio files, good and bad; the log-mel front end against a plain DFT."""

import numpy as np
import pytest
import soundfile
import torch
from clips import near
from supclap.audio import HOP, N_FFT, N_MELS, load_audio, log_mel, mel_filters
from supclap.batches import pad_features
from supclap.builtin import Bytes
from supclap.corpus import load_corpus
from supclap.errors import UserError
from supclap.manifest import read_manifest


def tone(rate, seconds=1.0, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def manifest_of(folder, text, name="m.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("file_name,caption_1\n", "a header and no clip"),
        ("file,caption_1\na.wav,x\n", "no column of files (file_name, audio, "),
        ("file,text\na.wav,x\n", "wav, filename) and none of captions (caption, caption_1, "),
        ("audio;caption\na.wav;x\n", "it has audio;caption; commas separate the columns of a .csv"),
        ("file_name,said\na.wav,x\n", "no column of captions (caption, caption_1, "),
        (
            "file_name,caption_1,caption_2\na.wav,,\n",
            "line 2 (a.wav): caption_1, caption_2 are empty",
        ),
        ("file_name,caption_1\na.wav,x\nb.wav,  \n", "line 3 (b.wav): caption_1 is empty"),
        ("file_name,caption_1\n,x\n", "line 2: file_name is empty"),
        ("file_name,caption_1\na.wav,one, two\n", "a text with a comma in it needs quotes"),
    ],
)
def test_a_bad_manifest_is_explained(tmp_path, text, expected):
    with pytest.raises(UserError) as error:
        read_manifest(manifest_of(tmp_path, text))
    assert expected in str(error.value)
    assert "m.csv" in str(error.value)


def test_missing_or_binary_manifest(tmp_path):
    with pytest.raises(UserError, match="manifest not found"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(UserError, match="cannot read the manifest"):
        read_manifest(tmp_path / "m.csv")


def test_file_names_resolve_beside_the_manifest_then_in_audio(tmp_path):
    (tmp_path / "audio").mkdir()
    for path in ("both.wav", "audio/both.wav", "audio/only there.wav"):
        (tmp_path / path).touch()
    clips = read_manifest(
        manifest_of(
            tmp_path,
            "\ufefffile_name, caption_1 ,caption_2\n"  # a byte order mark and blanks
            'both.wav,"one, with a comma",  two   words \n'
            "only there.wav,drei,vier\n"
            "both.wav,five,six\n",
        )
    )
    assert [clip.path.relative_to(tmp_path).as_posix() for clip in clips] == [
        "both.wav",
        "audio/only there.wav",
    ]
    assert clips[0].captions == ("one, with a comma", "two words", "five", "six")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (11_025, 1)])
def test_any_format_rate_and_channels_become_16_khz_mono(tmp_path, suffix, rate, channels):
    path = tmp_path / f"a.{suffix}"
    wave = tone(rate)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate)
    loaded = load_audio(path, max_seconds=30.0)
    assert loaded.dtype == np.float32 and loaded.ndim == 1
    assert abs(len(loaded) - 16_000) < 2_000  # mp3 pads
    middle = loaded[4_000:12_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(spectrum.argmax() * 2.0 - 440.0) <= 2.0
    assert near(np.sqrt(np.mean(middle**2)), 0.5 / np.sqrt(2), within=0.02)


def test_stereo_is_averaged_and_long_clips_are_cut(tmp_path):
    wave = tone(22_050, seconds=3.0)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, -wave], axis=1), 22_050)
    assert np.abs(load_audio(tmp_path / "a.wav", 30.0)).max() < 1e-3
    assert len(load_audio(tmp_path / "a.wav", 0.5)) == 8_000


def bad_files(folder):
    soundfile.write(folder / "empty.wav", np.zeros((0, 1)), 16_000)
    (folder / "text.wav").write_text("this is no audio")
    (folder / "headless.raw").write_bytes(bytes(1_000))
    broken = tone(16_000)
    broken[100] = np.nan
    soundfile.write(folder / "nan.wav", broken, 16_000, subtype="FLOAT")
    return {
        "missing.wav": "no such file",
        "empty.wav": "zero length",
        "text.wav": "not readable as audio",
        "headless.raw": "not readable as audio",
        "nan.wav": "NaN or infinite samples",
    }


def test_bad_audio_is_named_or_skipped_and_counted(tmp_path):
    reasons = bad_files(tmp_path)
    soundfile.write(tmp_path / "good.wav", tone(16_000), 16_000)
    rows = [f"{name},x" for name in [*reasons, "good.wav"]]
    manifest = manifest_of(tmp_path, "\n".join(["file_name,caption_1", *rows]))
    with pytest.raises(UserError) as error:
        load_corpus(manifest, 30.0)
    assert "5 of 6 audio files" in str(error.value) and "--skip-bad-audio" in str(error.value)
    for name, reason in reasons.items():
        (line,) = [part for part in str(error.value).splitlines() if name in part]
        assert reason in line
    corpus = load_corpus(manifest, 30.0, skip_bad_audio=True)
    assert [clip.name for clip in corpus.clips] == ["good.wav"]
    assert len(corpus.skipped) == 5 and corpus.captions == ["x"]

    (tmp_path / "good.wav").unlink()
    with pytest.raises(UserError, match="no audio file of .* can be used"):
        load_corpus(manifest, 30.0, skip_bad_audio=True)


def test_log_mel_is_the_mel_weighted_power_spectrum_in_decibels():
    wave = torch.randn(4_000, generator=torch.Generator().manual_seed(0))
    features = log_mel(wave)
    assert features.shape == (1 + 4_000 // HOP, N_MELS)
    frame = 9  # away from the borders
    cut = wave.numpy().astype(np.float64)[frame * HOP - N_FFT // 2 : frame * HOP + N_FFT // 2]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    power = np.abs(np.fft.rfft(cut * window)) ** 2
    expected = 10 * np.log10(power @ mel_filters().double().numpy())
    assert near(features[frame].numpy(), expected, within=1e-2)


def test_mel_filters_peak_at_the_htk_centres():
    filters = mel_filters()
    for frequency in (400.0, 1_000.0, 3_000.0):
        mel = 2595 * np.log10(1 + frequency / 700)
        expected = mel / (2595 * np.log10(1 + 8_000 / 700)) * (N_MELS + 1) - 1
        peak = filters[round(frequency / 31.25)].argmax().item()
        assert abs(peak - expected) <= 0.6
    assert filters.min() >= 0 and filters.max() <= 1
    assert (filters.sum(dim=0) > 0).all()


@pytest.mark.parametrize("length", [1, 100, 256, 257, 512, 1_000])
def test_very_short_and_silent_clips_have_finite_features(length):
    features = log_mel(torch.zeros(length))
    assert features.shape[0] >= 1 and features.isfinite().all()


def test_loud_clips_have_finite_features(tmp_path):
    soundfile.write(tmp_path / "a.wav", 1e14 * tone(16_000), 16_000, subtype="FLOAT")
    features = log_mel(torch.from_numpy(load_audio(tmp_path / "a.wav", 30.0))).half()
    assert features.isfinite().all()


def test_padding_and_caption_bytes():
    mel, lengths = pad_features([torch.ones(3, N_MELS), torch.ones(5, N_MELS)])
    assert mel.shape == (2, 5, N_MELS) and lengths.tolist() == [3, 5]
    assert mel[0, 3:].abs().sum() == 0
    (text,) = Bytes(3)(["Ab", "é!x"], ["eng", "eng"])
    assert text.tolist() == [[98, 99, 0], [0xC3 + 1, 0xA9 + 1, 34]]
