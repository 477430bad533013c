"""Max calibration of K and V by nvidia-modelopt, in a process of its own: importing it takes seconds and 570 MiB.

``measure_amax`` is called from outside and starts ``python -m moesaic.recover.calibrate_kv.modelopt request.json``,
which takes one layer at a time through modelopt: its quantisers sit on K after RoPE and on V and, while they calibrate,
round nothing, so that every layer sees the states of the unrounded model. Only one layer's weights are in memory.
Sequences are padded on the right, where nothing else looks; what padding computes is zeroed before it is counted.
"""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.files import write_text_atomically
from moesaic.core.progress import track
from moesaic.data.batches import Batch
from moesaic.models import layers, loading
from moesaic.models.checkpoint import Checkpoint

Amax = tuple[float, float]
"""The largest magnitudes of a layer's K and V."""

_KV_QUANTIZERS = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},  # without it, weights would get modelopt's default: INT8
        {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}, "enable": True},
    ],
    "algorithm": "max",
}


def measure_amax(model: Path, batches: Sequence[Batch], precision: str, scratch: Path) -> list[Amax]:
    """Every layer's amax of K and V over the tokens of a calibration set; a result in ``scratch`` is used again.

    Raises:
        ConfigError: if nvidia-modelopt is not installed.
        StageError: if its process fails.
    """
    if importlib.util.find_spec("modelopt") is None:
        raise ConfigError("FP8 scales are calibrated by nvidia-modelopt, which is not installed; install moesaic[kv]")
    request, answer = scratch / "request.json", scratch / "amax.json"
    if not answer.is_file():
        content = {
            "model": str(model.absolute()),
            "precision": precision,
            "sequences": [
                [row[kept].tolist() for row, kept in zip(batch.token_ids, batch.is_token, strict=True)]
                for batch in batches
            ],
            "answer": str(answer.absolute()),
        }
        request.write_text(json.dumps(content))
        ended = subprocess.run([sys.executable, "-m", __name__, str(request)], check=False)
        if ended.returncode:
            raise StageError(f"nvidia-modelopt's process ended with {ended.returncode}; its message stands above")
    return [(float(key), float(value)) for key, value in json.loads(answer.read_text())]


def main(request: Path) -> None:
    """Calibrate as the request file says, and write the amax of every layer to its answer file."""
    content = json.loads(request.read_text())
    batches = [_pad(sequences) for sequences in content["sequences"]]
    amax = list(_calibrate(Checkpoint.open(Path(content["model"])), batches, getattr(torch, content["precision"])))
    write_text_atomically(Path(content["answer"]), json.dumps(amax) + "\n")


def _pad(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are tokens, [batch time]."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    token_ids = nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    return token_ids, torch.arange(token_ids.shape[1]) < lengths.unsqueeze(1)


def _calibrate(checkpoint: Checkpoint, batches: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Iterator[Amax]:
    """Take the states of all batches through the layers, one layer after the other."""
    quantize, device = _import_quantize(), loading.choose_device()
    states = loading.embed(checkpoint, [token_ids for token_ids, _ in batches], dtype)
    is_token = [mask for _, mask in batches]
    rotary = loading.rotary(checkpoint, max(batch.shape[1] for batch in states), dtype, device)

    def calibrate(layer: int) -> Amax:
        """Nothing of the layer is left when the next one is read."""
        block = loading.load_block(checkpoint, layer, dtype, device)
        window = checkpoint.architecture.blocks[layer].window
        run = partial(_run_batches, block=block, states=states, is_token=is_token, rotary=rotary, window=window)
        with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():  # modelopt prints for every layer
            quantize(_Attention(block), _KV_QUANTIZERS, run)
        return float(block.self_attn.k_bmm_quantizer.amax), float(block.self_attn.v_bmm_quantizer.amax)

    yield from map(calibrate, track(range(checkpoint.num_layers), checkpoint.num_layers, "calibrating layers"))


def _run_batches(
    attention: nn.Module,
    block: layers.DecoderLayer,
    states: list[Tensor],
    is_token: Sequence[Tensor],
    rotary: layers.Rotary,
    window: int | None,
) -> None:
    """Take the states on to the next layer, in place, while the quantisers in ``attention`` measure."""
    device = rotary[0].device
    for index, mask in enumerate(is_token):
        with _masked_padding(mask.to(device), attention.get_submodule("self_attn")):
            states[index] = layers.run_block(block, states[index].to(device), rotary, window).cpu()


@contextlib.contextmanager
def _masked_padding(is_token: Tensor, attention: nn.Module) -> Iterator[None]:
    """Within the block the quantisers see zeros in place of padding, so that padding never sets the amax."""

    def zero_padding(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].masked_fill(~is_token[:, None, :, None], 0), *args[1:])

    quantizers = (attention.get_submodule("k_bmm_quantizer"), attention.get_submodule("v_bmm_quantizer"))
    handles = [quantizer.register_forward_pre_hook(zero_padding) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _import_quantize() -> Callable[..., nn.Module]:
    """modelopt's entry point, imported without its remarks about versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization import quantize
    function: Callable[..., nn.Module] = quantize
    return function


class _Attention(PreTrainedModel):
    """One layer's attention as a model: modelopt looks for attention to hook in transformers models only."""

    def __init__(self, block: layers.DecoderLayer) -> None:
        super().__init__(block.self_attn.config)
        self.self_attn = block.self_attn


if __name__ == "__main__":
    main(Path(sys.argv[1]))
