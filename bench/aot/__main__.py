"""Compile the GPU kernels as they are shipped, without a GPU, and report what came out.

    python -m bench.aot --arch sm_80|sm_90|sm_100 [--kernel NAME] [--only LABEL] [--jobs N]
    python -m bench.aot --backend cuda --arch sm_80|sm_90a|sm_100       of this checkout's build
    python -m bench.aot --backend hopper                                compiled for the purpose

prints one JSON object per line, as triton.py and cuda.py describe it.
"""

import argparse
import json
import os
import sys

from . import cuda, triton


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", choices=("triton", "cuda", "hopper"), default="triton")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--only", default="", help="part of a label, such as bfloat16 or siglip")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing is compiled in the interpreter")
    if options.backend == "hopper":
        lines = cuda.report_hopper()
    elif options.backend == "cuda":
        lines = cuda.report(options.arch)
    else:
        architectures = {f"sm_{number}": number for number in triton.SHARED_LIMIT}
        if options.arch not in architectures:
            parser.error(f"--arch must be one of {', '.join(architectures)}, got {options.arch}")
        arch = architectures[options.arch]
        lines = triton.report(arch, options.kernel, options.jobs, options.only)
    for line in lines:
        if options.kernel in line["name"]:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
