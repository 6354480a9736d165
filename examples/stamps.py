"""A corpus of real recordings from a Debian package: the stamps of Tux Paint.

    apt install tuxpaint-stamps-default
    python examples/stamps.py --out stamps               # spoken descriptions, three languages
    python examples/stamps.py --out effects --effects    # sound effects, captions in eight
    supclap reproduce --real stamps --out reproduction

The package is under the GPL 2, and nothing of it is in this repository. The script writes
`train.jsonl`, `val.jsonl` and `test.jsonl`. Clips that share an English description or the same
bytes are in one split: nothing that is held out is trained on.
"""

import argparse
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

from supclap.leaks import sentence

FOLDER = Path("/usr/share/tuxpaint/stamps")
SPOKEN = {"fr": "fra", "es": "spa", "ca": "cat"}
SHOWN = {
    "en": "eng", "fr": "fra", "de": "deu", "nl": "nld", "ca": "cat", "es": "spa", "ja": "jpn",
    "zh_CN": "zho",
}  # fmt: skip
SHARES = {"test": 0.2, "val": 0.1}  # of the groups; the rest is trained on


def descriptions(path: Path) -> dict[str, str]:
    """The sentences of a stamp by their language; the first line is English."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {"en": lines[0].strip()} if lines else {}
    for line in lines[1:]:
        match = re.match(r"([A-Za-z_@]+)\.utf8=(.*\S)", line)
        if match:
            found[match[1]] = match[2].strip()
    return {language: text for language, text in found.items() if text}


def clips(effects: bool) -> list[dict]:
    """Every clip with its captions, and the English description that it belongs to."""
    found = []
    for path in sorted(FOLDER.rglob("*.txt")):
        said = descriptions(path)
        if "en" not in said:
            continue
        if effects:
            sounds = [path.with_suffix(suffix) for suffix in (".ogg", ".wav")]
            captions = {code: [said[name]] for name, code in SHOWN.items() if name in said}
            pairs = [(sound, captions) for sound in sounds if sound.is_file()][:1]
        else:
            pairs = [
                (path.with_name(f"{path.stem}_desc_{name}.ogg"), {code: [said[name]]})
                for name, code in SPOKEN.items()
                if name in said
            ]
        for sound, captions in pairs:
            if sound.is_file() and sound.stat().st_size:
                found.append({"audio": str(sound), "captions": captions, "group": said["en"]})
    return found


def groups(found: list[dict]) -> list[list[dict]]:
    """Clips that share an English description, a caption or the same bytes, joined."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for clip in found:
        names = [sentence(clip["group"])]
        names.append(hashlib.sha256(Path(clip["audio"]).read_bytes()).hexdigest())
        for code, texts in clip["captions"].items():
            names += [f"{code} {sentence(text)}" for text in texts]
        for name in names[1:]:
            parent[root(name)] = root(names[0])
        clip["group"] = names[0]
    joined = defaultdict(list)
    for clip in found:
        joined[root(clip.pop("group"))].append(clip)
    return list(joined.values())


def split_of(group: list[dict]) -> str:
    """By a digest of its first file: the same on every machine."""
    name = str(Path(group[0]["audio"]).relative_to(FOLDER))
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--effects", action="store_true", help="sound effects instead of speech")
    arguments = parser.parse_args()
    if not FOLDER.is_dir():
        parser.exit(2, f"{FOLDER} is missing: apt install tuxpaint-stamps-default\n")
    splits = defaultdict(list)
    for group in groups(clips(arguments.effects)):
        splits[split_of(group)] += group
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (arguments.out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{split}: {len(lines)} clips")


if __name__ == "__main__":
    main()
