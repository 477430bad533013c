"""Speed of MXFP4 packing and unpacking against ModelOpt's ``MXFP4QTensor``, in CPU seconds of one thread.

The weights are one expert's of gpt-oss-120b (gate_up_proj 5760 x 2880, down_proj 2880 x 2880), random. Both sides get
the same tensors, take turns, and make the same thing: codes and scales out of weights, weights out of codes and scales.
Of all rounds the least counts. The bars are for a whole expert in bfloat16, the type of gpt-oss's other weights and
what ModelOpt unpacks such weights to; float32 and a small tensor are measured beside it. The ratio depends on the
size: ModelOpt holds many times the result in between, which costs it more once the system hands that memory out anew
each time; where everything fits into memory held already, packing is 8 and unpacking 5 to 10 times faster.

Where the two results differ is recorded as well: scales are equal, and codes are, but for exact ties
(ModelOpt rounds down, Moesaic to the even code) and exact zeros (ModelOpt stores -0).

Run: python benchmarks/mxfp4_speed.py [--rounds 5] [--record FILE]
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bars import Bar, conclude, cpu_seconds
from torch import Tensor

from moesaic.models import mxfp4

BAR = 20.0
EXPERT = {"gate_up_proj": (5760, 2880), "down_proj": (2880, 2880)}
SHAPES = EXPERT | {"small": (1024, 1024)}
TABLE = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def import_modelopt() -> Any:
    """ModelOpt's class, without its remarks about versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
    return MXFP4QTensor


def measure(theirs: Any, weight: Tensor, rounds: int) -> dict[str, float]:
    """CPU seconds of each side's two ways, the least of all rounds."""
    packed, scale = theirs.quantize(weight, mxfp4.BLOCK)
    own = mxfp4.quantize(weight)
    actions: dict[str, Callable[[], object]] = {
        "pack": lambda: mxfp4.quantize(weight),
        "pack_modelopt": lambda: theirs.quantize(weight, mxfp4.BLOCK),
        "unpack": lambda: mxfp4.dequantize(*own, weight.dtype),
        "unpack_modelopt": lambda: packed.dequantize(weight.dtype, scale=scale, block_sizes={-1: mxfp4.BLOCK}),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(cpu_seconds(action))
    return {name: min(found) for name, found in times.items()}


def compare(theirs: Any, weight: Tensor) -> dict[str, float]:
    """Where the two differ, in shares of all scales and codes."""
    packed, their_scales = theirs.quantize(weight, mxfp4.BLOCK)
    blocks, scales = mxfp4.quantize(weight)
    codes, their_codes = _codes(blocks), _codes(packed._quantized_data.view(blocks.shape))
    scaled = weight.float().unflatten(-1, (-1, mxfp4.BLOCK)) * torch.exp2(127.0 - scales.float()).unsqueeze(-1)
    ties = torch.isin(scaled.abs(), (TABLE[1:] + TABLE[:-1]) / 2)
    explained = ties | (scaled == 0)
    return {
        "scales_that_differ": (scales != their_scales.view(scales.shape)).float().mean().item(),
        "codes_that_differ": (codes != their_codes).float().mean().item(),
        "codes_that_differ_beside_ties_and_zeros": ((codes != their_codes) & ~explained).float().mean().item(),
        "ties": ties.float().mean().item(),
        "zeros": (scaled == 0).float().mean().item(),
    }


def _codes(blocks: Tensor) -> Tensor:
    return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    theirs, draws = import_modelopt(), torch.Generator().manual_seed(0)
    rows, bars, differences = [], [], {}
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        weights = {name: (torch.randn(shape, generator=draws) * 0.02).to(dtype) for name, shape in SHAPES.items()}
        differences[kind] = compare(theirs, weights["down_proj"])
        seconds = {name: measure(theirs, weight, given.rounds) for name, weight in weights.items()}
        for way in ("pack", "unpack"):
            own, other = (sum(seconds[name][way + side] for name in EXPERT) for side in ("", "_modelopt"))
            if dtype == torch.bfloat16:
                bars.append(Bar(f"CPU seconds of ModelOpt to {way} one expert, over ours, {kind}", other / own, BAR))
            for name, taken in seconds.items():
                rows.append(
                    {
                        "dtype": kind,
                        "tensor": name,
                        "way": way,
                        "ns_per_value": round(taken[way] / weights[name].numel() * 1e9, 3),
                        "modelopt_ns_per_value": round(taken[f"{way}_modelopt"] / weights[name].numel() * 1e9, 3),
                        "modelopt_over_ours": round(taken[f"{way}_modelopt"] / taken[way], 1),
                    }
                )
    found: dict[str, Any] = {"rounds": given.rounds, "rows": rows, "difference_from_modelopt": differences}
    conclude(f"python benchmarks/mxfp4_speed.py --rounds {given.rounds}", bars, found, given.record)


if __name__ == "__main__":
    main()
