"""The synthetic corpus: what is heard is what the captions and `scenes.jsonl` say."""

import csv
import json
import re

import numpy as np
import pytest
import soundfile
from clips import near
from supclap import phrases, synth
from supclap.errors import UserError
from supclap.manifest import read_manifest

CLIPS = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    synth.synthesise(out, clips=CLIPS, seed=3)
    return out


@pytest.fixture(scope="module")
def truth(corpus):
    return [json.loads(line) for line in (corpus / "scenes.jsonl").read_text().splitlines()]


def test_manifests_have_clothos_columns_and_readable_audio(corpus):
    names = []
    for split in ("train", "val", "test"):
        with (corpus / f"{split}.csv").open() as stream:
            header = next(csv.reader(stream))
        assert header == ["file_name", *(f"caption_{i}" for i in range(1, 6))]
        for clip in read_manifest(corpus / f"{split}.csv"):
            names.append(clip.name)
            assert clip.path == corpus / "audio" / clip.name
            assert len(set(clip.captions)) == 5
            wave, rate = soundfile.read(clip.path)
            assert rate == 16_000 and 0.3 < len(wave) / rate < 6
            assert 0.4 < np.abs(wave).max() <= 1
    assert len(names) == len(set(names)) == CLIPS
    assert sorted(path.name for path in (corpus / "audio").iterdir()) == sorted(names)


REVERSED = (
    " after ",
    " après ",
    " davor ",
    " después de ",
    " na ",
    " abans ",
    "その前に",
    "在此之前",
)
"""Words of the templates that name the second phase first."""


def events_of(caption, language="eng"):
    """What a caption says, by its words alone: [(event, count), ...] in time order."""
    words = phrases.words_of(language)
    event_of = {}
    for kind, event in synth.EVENTS.items():
        for forms in words["events"][kind]:
            for count in range(1, event.most + 1):
                phrase = phrases.noun_phrase(forms, count, words)
                assert event_of.setdefault(phrase, (kind, count)) == (kind, count), phrase
    pattern = "|".join(sorted(map(re.escape, event_of), key=len, reverse=True))
    events = [event_of[hit] for hit in re.findall(pattern, caption)]
    return events[::-1] if any(word in caption for word in REVERSED) else events


@pytest.mark.parametrize("language", phrases.CODES)
def test_every_language_tells_every_scene(language):
    """Phases, counts, order and background can be read off each caption; no two are the same."""
    rng, words = np.random.default_rng(5), phrases.words_of(language)
    assert set(words["events"]) == set(synth.EVENTS)
    assert set(words["backgrounds"]) == set(synth.BACKGROUNDS) - {"none"}
    for _ in range(150):
        scene = synth.draw_scene(rng)
        captions = phrases.describe(scene.phases, scene.background, rng, language)
        assert len(set(captions)) == phrases.CAPTIONS
        for caption in captions:
            assert "{" not in caption and "  " not in caption
            assert events_of(caption, language) == list(scene.phases), caption
            rest = caption
            for kind, count in scene.phases:  # the words of the events taken away
                for forms in words["events"][kind]:
                    rest = rest.replace(phrases.noun_phrase(forms, count, words), "", 1)
            for name, heard in words["backgrounds"].items():
                assert any(word in rest for word in heard) == (name == scene.background), caption


def test_several_languages_and_other_acoustics(tmp_path):
    synth.synthesise(tmp_path / "a", clips=12, seed=1, languages=("eng", "zho"))
    synth.synthesise(tmp_path / "b", clips=12, seed=1, languages=("fra",), shifted=True)
    clips = read_manifest(tmp_path / "a/train.jsonl")
    assert [clip.languages for clip in clips] == [("eng",) * 5 + ("zho",) * 5] * len(clips)
    others = read_manifest(tmp_path / "b/train.csv")
    assert others[0].languages == ("fra",) * 5
    for clip, other in zip(clips, others, strict=True):
        first, second = (soundfile.read(x.path)[0] for x in (clip, other))
        assert len(second) > 1.2 * len(first) and np.abs(second).max() > 0.5
    with pytest.raises(UserError, match="'xxx' is none of eng, fra"):
        synth.synthesise(tmp_path / "c", clips=12, languages=("xxx",))


def test_captions_say_what_was_composed(corpus, truth):
    captions = {
        clip.name: clip.captions
        for split in ("train", "val", "test")
        for clip in read_manifest(corpus / f"{split}.csv")
    }
    for entry in truth:
        composed = [(phase["event"], phase["count"]) for phase in entry["phases"]]
        for phase in entry["phases"]:
            assert len(phase["onsets"]) == phase["count"]
        flat = [onset for phase in entry["phases"] for onset in phase["onsets"]]
        assert flat == sorted(flat)
        for caption in captions[entry["file_name"]]:
            assert events_of(caption) == composed, caption
            for name, words in phrases.words_of("eng")["backgrounds"].items():
                heard = any(re.search(rf"\b{word}\b", caption) for word in words)
                assert heard == (name == entry["background"]), caption


def test_clicks_are_heard_where_and_as_often_as_they_are_written(truth):
    for count in (1, 2, 3, 4):
        scene = synth.Scene((("click", count),), "none")
        wave, onsets = synth.compose(scene, np.random.default_rng(count))
        loud = np.flatnonzero(np.abs(wave) > 0.05 * np.abs(wave).max()) / synth.RATE
        starts = loud[np.diff(loud, prepend=-1.0) > 0.1]
        assert len(starts) == count
        assert near(starts, onsets[0], within=0.01)


def test_a_rising_chirp_rises_and_a_falling_one_falls():
    for kind, sign in (("rising", 1), ("falling", -1)):
        wave = synth.EVENTS[kind].sound(np.random.default_rng(0))
        parts = [
            np.abs(np.fft.rfft(part)).argmax() / len(part) for part in np.split(wave[:8000], 2)
        ]
        assert sign * (parts[1] - parts[0]) > 0


def test_hard_negatives_differ_in_order_or_count_only(truth):
    families = {}
    for entry in truth:
        families.setdefault(entry["family"], {})[entry["variant"]] = entry
    seen = set()
    for members in families.values():
        assert len({entry["split"] for entry in members.values()}) == 1
        if "base" not in members:
            continue
        base = members["base"]
        phases = [(phase["event"], phase["count"]) for phase in base["phases"]]
        for variant in members.keys() - {"base"}:
            seen.add((variant, base["split"]))
            other = [(p["event"], p["count"]) for p in members[variant]["phases"]]
            assert members[variant]["background"] == base["background"]
            if variant == "order":
                assert other == phases[::-1] != phases
            else:
                assert [kind for kind, _ in other] == [kind for kind, _ in phases]
                assert sum(a != b for a, b in zip(other, phases, strict=True)) == 1
    assert {("order", "test"), ("count", "test"), ("order", "train"), ("count", "train")} <= seen


def test_no_scene_is_in_the_corpus_twice(truth):
    scenes = {json.dumps([e["background"], [[p["event"], p["count"]] for p in e["phases"]]])
              for e in truth}  # fmt: skip
    assert len(scenes) == CLIPS


def test_the_seed_decides_every_byte(corpus, tmp_path):
    synth.synthesise(tmp_path / "same", clips=CLIPS, seed=3)
    synth.synthesise(tmp_path / "other", clips=CLIPS, seed=4)
    files = sorted(path.relative_to(corpus) for path in corpus.rglob("*.*"))
    assert len(files) == CLIPS + 4
    for name in files:
        assert (corpus / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert (corpus / "train.csv").read_bytes() != (tmp_path / "other/train.csv").read_bytes()


def test_an_earlier_corpus_is_kept_and_sizes_are_checked(corpus, tmp_path):
    before = (corpus / "train.csv").read_bytes()
    with pytest.raises(UserError, match="already holds a corpus"):
        synth.synthesise(corpus, clips=5, seed=9)
    assert (corpus / "train.csv").read_bytes() == before
    with pytest.raises(UserError, match="--clips must be between"):
        synth.synthesise(tmp_path / "x", clips=2)
    synth.synthesise(tmp_path / "least", clips=3)
    for split in ("train", "val", "test"):
        assert len(read_manifest(tmp_path / "least" / f"{split}.csv")) == 1
