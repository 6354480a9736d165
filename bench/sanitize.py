"""Small cases of every way for compute-sanitizer: ragged sizes, several tiles, literal rows."""

import torch

from supclap_kernels import fused_svr_loss
from supclap_kernels.testing import Case, evaluate, make_inputs

from .peers import way_state

WAYS = ("triton:panel", "triton:tile", "cuda:panel", "cuda:hopper", "cuda:single")
MODES: tuple[dict[str, str], ...] = ({}, {"bilateral": "shared"}, {"objective": "siglip"})


def main() -> None:
    for way in WAYS:
        if way == "cuda:hopper" and way_state(way) != "ok":
            print(f"{way}: {way_state(way)}", flush=True)
            continue
        for dtype in (torch.bfloat16, torch.float32):
            if way == "cuda:hopper" and dtype == torch.float32:
                continue  # its kernels take 16 bits
            for options in MODES:
                case = Case(N=161, D=100, dtype=dtype, gap=0.05, radius="row", options=options)
                inputs = make_inputs(case, "cuda")
                evaluate(fused_svr_loss, inputs, backend=way, workspace=0, **options)
                torch.cuda.synchronize()
                print(way, case, flush=True)


if __name__ == "__main__":
    main()
