"""How manifests are written: what `supclap check --help` shows."""

FORMATS = """\
    CSV    file_name, caption_1, ... caption_k [, lang]     Clotho; rows of one file are joined
           file_name, caption [, lang]                      one caption a row
           file_name, caption, caption_fr, caption_de_1     several languages
           audiocap_id, youtube_id, start_time, caption     AudioCaps as published
           audio, path, wav or filename for file_name; .tsv: tabs for commas
    JSON   {"data": [{"id" | "audio", "caption" | "caption_1", ..., ["lang"]}]}   WavCaps, ML-CLAP;
           or the list alone
    JSONL  {"audio": ..., "captions": ["..."] | {"eng": ["..."]} [, "lang": "eng"]}
    Parquet   a row as a line of JSONL; its audio a name, or {"bytes", "path"} (datasets' Audio)
    tar    KEY.flac beside KEY.json (of JSONL's keys, or "text") or KEY.txt; {000..012} in a name
           stands for all of them

Captions are in `caption`, `caption_2`, `caption_fr`, `caption_fr_2` and `captions`;
`hard_negative`, `hard_negative_2` and `hard_negatives` hold captions that are wrong for the clip;
every other column is unused. A clip may have any number of captions: the other cells are empty. A
file is looked for in the manifest's own folder, then in `audio/` beside it: under its name as
written, then under one that looks the same.
"""
