"""Tables as people have them: other columns beside the captions, quotes, names, languages."""

import io
import json
import os
import tarfile
import unicodedata

import numpy as np
import pytest
import soundfile
from supclap.cli import main
from supclap.errors import UserError
from supclap.folders import EXTENSIONS, alike
from supclap.hub import Tokenizer
from supclap.languages import caption_language, language_code
from supclap.manifest import read_manifest, scan_manifest
from supclap.zeroshot import labelled_clips


def hum(path, seconds=0.2):
    soundfile.write(path, 0.5 * np.sin(np.arange(int(16_000 * seconds)) / 20), 16_000)
    return path


def pairs_of(clip):
    return list(zip(clip.captions, clip.languages, strict=True))


WIDE = {"caption": "a dog", "caption_fr": "un chien", "caption_de_1": "ein Hund"}
OTHERS = {"caption_id": "77", "caption_source": "crowd", "caption_len": "5", "title": "x"}
EXPECTED = [("a dog", "eng"), ("un chien", "fra"), ("ein Hund", "deu")]


@pytest.mark.parametrize("format", ["csv", "json", "jsonl", "tar"])
def test_only_columns_of_captions_are_captions(tmp_path, capsys, format):
    hum(tmp_path / "a.wav")
    row = {"file_name": "a.wav", **WIDE, **OTHERS}
    path = tmp_path / f"m.{format}"
    if format == "csv":
        path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    elif format == "json":
        path.write_text(json.dumps({"data": [row]}))
    elif format == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "a.wav", "a.wav")
            content = json.dumps(row).encode()
            info = tarfile.TarInfo("a.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (clip,) = read_manifest(path)
    assert pairs_of(clip) == EXPECTED
    assert main(["check", str(path)]) == 0
    assert f"unused columns: {', '.join(OTHERS)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "language"),
    {
        "caption": "", "caption_12": "", "caption_fra": "fra", "caption_fr_2": "fra",
        "caption_French": "fra", "caption_eng_Latn": "eng", "caption_zho_Hant_1": "zho_Hant",
        "caption_pt_BR": "por", "caption_yue": "yue", "caption_ind": "ind",
        "caption_id": None, "caption_en_id": None, "caption_source": None, "caption_raw": None,
        "caption_url": None, "caption_lang": None, "caption_second": None, "caption_1_fr": None,
        "caption_src": None, "caption_vec": None, "caption_nan": None, "caption_et": "est",
        "caption_": None, "captions_fr": None, "caption_gpt4": None, "caption_en_raw": None,
    }.items(),
)  # fmt: skip
def test_names_of_columns(column, language):
    assert caption_language(column) == language


FLORES = """ace_Arab ace_Latn acm_Arab acq_Arab afr_Latn ajp_Arab aka_Latn amh_Ethi apc_Arab
    arb_Arab arz_Arab ast_Latn azb_Arab azj_Latn bel_Cyrl ben_Beng bod_Tibt bul_Cyrl cat_Latn
    ces_Latn ckb_Arab crh_Latn dan_Latn deu_Latn ell_Grek eng_Latn epo_Latn est_Latn fin_Latn
    fra_Latn gaz_Latn hau_Latn heb_Hebr hin_Deva hye_Armn ind_Latn isl_Latn ita_Latn jpn_Jpan
    kas_Arab kas_Deva khk_Cyrl kor_Hang lvs_Latn min_Arab min_Latn nld_Latn nno_Latn nob_Latn
    npi_Deva pbt_Arab pes_Arab plt_Latn por_Latn prs_Arab rus_Cyrl sat_Olck spa_Latn srp_Cyrl
    swh_Latn taq_Latn taq_Tfng tgl_Latn twi_Latn tzm_Tfng uzn_Latn vec_Latn yue_Hant zho_Hans
    zho_Hant zsm_Latn""".split()


class Nllb:
    src_lang = "eng_Latn"
    pad_token_id = 1

    def get_added_vocab(self):
        return dict.fromkeys(["<mask>", *FLORES])


@pytest.mark.parametrize("code", FLORES)
def test_a_text_encoder_knows_its_languages(code):
    """By its own code and, of one script, by the bare one."""
    tokenizer = Tokenizer(Nllb(), 9)
    assert tokenizer.code(language_code(code)) == code
    if sum(flores[:3] == code[:3] for flores in FLORES) == 1:
        assert tokenizer.code(language_code(code[:3])) == code


def test_a_text_encoder_finds_the_nearest():
    tokenizer = Tokenizer(Nllb(), 9)
    named = {"ko_KR": "kor_Hang", "ps": "pbt_Arab", "no": "nob_Latn", "zh": "zho_Hans"}
    assert {name: tokenizer.code(language_code(name)) for name in named} == named
    with pytest.raises(UserError, match="has no language 'glg'"):
        tokenizer.code("glg")


def test_a_column_of_numbers_is_in_no_language(tmp_path):
    rows = [{"audio": "a.wav", "caption": "x", "caption_no": n} for n in ("1", 1, 2.5, None, "nan")]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert pairs_of(read_manifest(path)[0]) == [("x", "eng")] * 5
    path = tmp_path / "m.csv"
    path.write_text("file_name,caption,caption_no\na.wav,one,1\na.wav,two,nan\n")
    assert pairs_of(read_manifest(path)[0]) == [("one", "eng"), ("two", "eng")]
    path.write_text("file_name,caption,caption_no\na.wav,one,1\nb.wav,two,2\n")
    assert [pairs_of(clip) for clip in read_manifest(path)] == [[("one", "eng")], [("two", "eng")]]
    path.write_text("file_name,caption,caption_no\na.wav,one,en\n")
    assert pairs_of(read_manifest(path)[0]) == [("one", "eng"), ("en", "nor")]


def test_a_wide_table_has_holes(tmp_path):
    """A translation that is missing is left out, a caption that is missing is a problem."""
    path = tmp_path / "m.csv"
    path.write_text("file_name,caption,caption_fr\na.wav,one,un\nb.wav,two,\nc.wav,,trois\n")
    clips, problems, _ = scan_manifest(path)
    assert [pairs_of(clip) for clip in clips] == [[("one", "eng"), ("un", "fra")], [("two", "eng")]]
    assert len(problems) == 1 and "line 4 (c.wav): caption is empty" in problems[0]
    rows = [
        {"audio": "a.wav", "caption": "one", "caption_fr": None},
        {"audio": "b.wav", "captions": {"en": "two", "fr": None}},
        {"audio": "c.wav", "caption": "three", "captions": []},
        {"audio": "d.wav", "caption_fr": None},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    clips, problems, _ = scan_manifest(path)
    assert [c.captions for c in clips] == [("one",), ("two",), ("three",)]
    assert len(problems) == 1 and "line 4 (d.wav): no caption" in problems[0]


def test_what_no_reader_survives_is_a_problem(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(f"file_name,caption,x\n{'a' * 300}.wav,one,{'y' * 200_000}\nb.wav,two,\n")
    assert len(read_manifest(path)) == 2
    path = tmp_path / "m.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="cannot read the manifest"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ('file_name,caption\na.wav,"a dog barks\nb.wav,a cat\nc.wav,a bird\n', 2, "unexpected end"),
        ('file_name,caption\na.wav,x\nb.wav,"a dog\nc.wav,a cat\nd.wav,"a bird"\n', 3, "expected"),
        ('file_name,caption\na.wav,"a "loud" dog"\n', 2, "expected after"),
        ("file_name,caption,caption\na.wav,x,y\n", 1, "column 'caption' is there several times"),
    ],
)
def test_a_quote_that_is_never_closed_swallows_nothing(tmp_path, text, line, expected):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_manifest(path)
    assert str(path) in str(error.value) and f"line {line}: " in str(error.value)
    assert expected in str(error.value)
    path.write_text(text.replace("caption", "label"))
    with pytest.raises(UserError, match=f"line {line}: "):
        labelled_clips(path)


def test_quotes_that_are_right(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(
        'file_name,caption\na.wav, "one, ""two"""\nb.wav, says "woof" twice\nc.wav,"two\nlines"\n'
    )
    clips = read_manifest(path)
    assert [c.captions[0] for c in clips] == ['one, "two"', 'says "woof" twice', "two lines"]
    assert [c.place for c in clips] == ["line 2", "line 3", "line 4"]


def test_a_name_as_written_comes_first(tmp_path):
    """Clotho has names that begin with a blank."""
    hum(tmp_path / " typical.wav"), hum(tmp_path / "plain.wav")
    (tmp_path / "audio").mkdir()
    hum(tmp_path / "audio/ in audio.wav")
    rows = [" typical.wav,one", " plain.wav ,two", " in audio.wav,three", "typical.wav,four"]
    path = tmp_path / "m.csv"
    path.write_text("\n".join(["file_name,caption_1", *rows]))
    clips = read_manifest(path)
    assert [clip.path.name for clip in clips] == [" typical.wav", "plain.wav", " in audio.wav"]
    assert clips[0].captions == ("one", "four")
    hum(tmp_path / "typical.wav")  # now there are both
    assert [c.path.name for c in read_manifest(path)][::3] == [" typical.wav", "typical.wav"]
    lines = [json.dumps({"audio": " typical.wav", "captions": "x"})]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    assert read_manifest(tmp_path / "m.jsonl")[0].path.name == " typical.wav"
    (tmp_path / "labels.csv").write_text("file_name,label\n typical.wav,x\n plain.wav,y\n")
    labelled, *_ = labelled_clips(tmp_path / "labels.csv")
    assert [clip.path.name for clip in labelled] == [" typical.wav", "plain.wav"]


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_composed_and_decomposed_names(tmp_path, written):
    stored = {"NFC": "NFD", "NFD": "NFC"}[written]
    (tmp_path / unicodedata.normalize(stored, "Köln")).mkdir()
    file = hum(tmp_path / unicodedata.normalize(stored, "Köln/é.wav"))
    path = tmp_path / "m.csv"
    name = unicodedata.normalize(written, "Köln/é.wav")
    path.write_text(f"file_name,caption\n{name},one\n", encoding="utf-8")
    assert [clip.path for clip in read_manifest(path)] == [file]
    assert alike(name) == alike(unicodedata.normalize(stored, name))
    path.write_text(f"file_name,label\n{name},one\n", encoding="utf-8")
    assert labelled_clips(path)[0][0].path == file


def test_names_that_are_not_utf_8(tmp_path, capsys):
    file = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    hum(tmp_path / "x.wav").rename(file)
    path = tmp_path / "m.csv"
    for name in (b"caf\xe9.wav", "café.wav".encode()):  # as the file system has it; as it is read
        path.write_bytes(b"file_name,caption\n" + name + b",a coffee\n")
        assert [str(clip.path) for clip in read_manifest(path)] == [file]
        assert main(["check", str(path)]) == 0
    path.write_bytes(b"file_name,caption\nx.wav,a caf\xe9\n")
    clips, problems, _ = scan_manifest(path)
    assert not clips and "line 2 (x.wav): 'a caf\\udce9' is not Unicode text" in problems[0]
    path.write_text("file_name,caption\nx.wav,one\n", encoding="utf-16")
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_manifest(path)
    capsys.readouterr()


def test_half_a_surrogate_pair_is_a_problem_with_its_line(tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    lines = ['{"audio": "a.wav", "captions": "a \\ud83d"}', '{"audio": "\\ud83d", "captions": "b"}']
    path.write_text("\n".join(lines))
    clips, problems, _ = scan_manifest(path)
    assert not clips and len(problems) == 2
    assert "line 1 (a.wav): 'a \\ud83d' is not Unicode text" in problems[0]
    assert "line 2" in problems[1]
    assert main(["check", str(path)]) == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "code"),
    {
        "en": "eng", "eng": "eng", "en-US": "eng", "English": "eng", "eng_Latn": "eng",
        "Deutsch": "deu", "ger": "deu", "zh": "zho", "cmn": "zho", "zho_Hans": "zho",
        "zh-TW": "zho_Hant", "iw": "heb", "pt_BR": "por", "arb_Arab": "ara", "arz": "arz",
        "sr_RS.UTF-8@latin": "srp_Latn", "be_BY@latin": "bel_Latn", "kor_Hang": "kor",
        "prs": "prs", "twi": "twi", "sr@latin": "srp_Latn", "ca@valencia": "cat",
        "en_US.UTF-8": "eng",
    }.items(),
)  # fmt: skip
def test_a_language_has_one_form(name, code):
    assert language_code(name) == code == language_code(code)


@pytest.mark.parametrize("name", ["xx", "jp", "und", "mul", "zxx", "", "second", "Englsh", "x" * 9])
def test_what_is_no_language(name):
    with pytest.raises(ValueError, match="is no language"):
        language_code(name)


def test_languages_of_a_table_have_one_form(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("file_name,caption,lang\na.wav,one,en\na.wav,two,eng\na.wav,drei,German\n")
    (clip,) = read_manifest(path)
    assert clip.languages == ("eng", "eng", "deu")
    path.write_text("file_name,caption,lang\na.wav,one,en\nb.wav,two,jp\n")
    assert "line 3 (b.wav): 'jp' is no language" in scan_manifest(path)[1][0]
    path = tmp_path / "m.jsonl"
    rows = [
        {"audio": "a.wav", "captions": {"fr": "un", "fra": "deux"}},
        {"audio": "b.wav", "captions": ["x", "y"], "lang": ["es", "spa"]},
        {"audio": "c.wav", "caption_1": "x", "source_lang_1": "zh"},
        {"audio": "d.wav", "captions": "x", "lang": ""},
        {"audio": "e.wav", "captions": {"xx": "x"}},
        {"audio": "f.wav", "captions": "x", "lang": 3},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    clips, problems, _ = scan_manifest(path)
    assert [clip.languages for clip in clips] == [("fra",) * 2, ("spa",) * 2, ("zho",), ("eng",)]
    assert len(problems) == 2 and "line 5 (e.wav): 'xx' is no language" in problems[0]


def test_a_language_of_the_command_line_has_one_form(tmp_path, capsys):
    out = tmp_path / "corpus"
    assert main(["synth", str(out), "--clips", "4", "--languages", "en", "French", "eng"]) == 0
    languages = {
        language for clip in read_manifest(out / "train.jsonl") for language in clip.languages
    }
    assert languages == {"eng", "fra"}
    assert main(["synth", str(tmp_path / "x"), "--languages", "xx"]) == 2
    assert "--languages: 'xx' is no language" in capsys.readouterr().err


def test_one_sentence_in_three_languages_is_no_problem(tmp_path, capsys):
    hum(tmp_path / "a.wav")
    path = tmp_path / "m.jsonl"
    captions = {"eng": "Banjo", "deu": "Banjo", "spa": ["Banjo"]}
    path.write_text(json.dumps({"audio": "a.wav", "captions": captions}))
    assert main(["check", str(path)]) == 0
    path.write_text(
        json.dumps({"audio": "a.wav", "captions": captions | {"spa": ["Banjo", "Banjo"]}})
    )
    assert main(["check", str(path)]) == 1
    assert "the caption 'Banjo' is there 2 times" in capsys.readouterr().out


def test_names_of_audio_are_what_the_decoder_reads(tmp_path):
    formats = {name.lower() for name in soundfile.available_formats()}
    for extension in (".oga", ".opus", ".aif", ".aiff", ".au", ".snd", ".caf", ".w64", ".mp3"):
        assert extension in EXTENSIONS
    assert formats - {e[1:] for e in EXTENSIONS} == {"raw", "mat4", "mat5"}
    for extension in (".oga", ".aif", ".snd", ".OGA"):
        format = {".aif": "AIFF", ".snd": "AU"}.get(extension, "OGG")
        soundfile.write(tmp_path / f"x{extension}", np.zeros(1600), 16_000, format=format)
        path = tmp_path / "m.jsonl"
        path.write_text(json.dumps({"audio": f"x{extension}", "captions": "x"}))
        assert read_manifest(path)[0].path.name == f"x{extension}"
