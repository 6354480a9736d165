"""The machine code in a binary, as Triton's copy of cuobjdump prints it."""

import collections
import re
import subprocess
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    name: str
    """with its modifiers, such as LDL.64"""
    operands: str


LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);")


def cuobjdump(*arguments: str | Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def functions(file: Path, *arguments: str) -> dict[str, list[Instruction]]:
    """The instructions of every function, by mangled name."""
    found: dict[str, list[Instruction]] = collections.defaultdict(list)
    name = ""
    for line in cuobjdump("-sass", *arguments, file).splitlines():
        if title := re.match(r"\s*Function : (\S+)", line):
            name = title[1]
        elif match := LINE.match(line):
            found[name].append(Instruction(int(match[1], 16), match[2], match[3]))
    return found


def count(instructions: list[Instruction], *names: str) -> dict[str, int]:
    """How many have each of these names, whatever their modifiers; by name in lower case."""
    counted = collections.Counter(x.name.split(".")[0] for x in instructions)
    return {name.lower(): counted[name] for name in names}
