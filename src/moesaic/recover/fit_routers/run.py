"""Fit the routers of a pruned child, layer by layer, each behind those that are fitted already.

A layer whose error on held-out sequences does not fall is handed on as it was.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.core.progress import track
from moesaic.data.batches import Batch
from moesaic.models import layers, layout, loading
from moesaic.models.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.models.layers import DecoderLayer
from moesaic.models.streaming import LayerReader, OffloadedTensor, StateOffloader, state_memory_bytes
from moesaic.recover.fit_routers.fit import Correction, Seen, fit, see
from moesaic.recover.fit_routers.stage import FitRoutersConfig
from moesaic.recover.layerwise import HELD_OUT_EVERY, changed_layers, read_batches

FITS = "router_fit.json"
"""The file beside the child's weights with the error of every fitted layer, before and after."""

Places = Int[Tensor, "token 2"]
"""Row and column of some tokens of a batch."""


@dataclass(frozen=True)
class LayerFit:
    """What the fit of a layer gave: the error of held-out tokens, as a share of what their mixtures must be."""

    layer: int
    error_before: float
    error_after: float
    """With the corrected router as it is stored."""

    @property
    def is_better(self) -> bool:
        """Whether the corrected router is handed on."""
        return self.error_after < self.error_before


@dataclass(frozen=True)
class _Tokens:
    """The calibration tokens, and which of them are fitted on and which are held out, by batch."""

    batches: Sequence[Batch]
    fitted: Sequence[Places]
    held_out: Sequence[Places]

    @classmethod
    def read(cls, config: FitRoutersConfig, model: Checkpoint, calibration: Path) -> "_Tokens":
        fitted, held_out = read_batches(
            calibration, model, config.max_sequences, config.max_tokens, config.batch_tokens
        )
        nowhere = torch.zeros(0, 2, dtype=torch.long)
        return cls(
            [*fitted, *held_out],
            [*_evenly(fitted, config.tokens), *[nowhere] * len(held_out)],
            [*[nowhere] * len(fitted), *_evenly(held_out, -(-config.tokens // (HELD_OUT_EVERY - 1)))],
        )


def run(
    config: FitRoutersConfig, *, child: Path, parent: Path, calibration: Path, output: Path, scratch: Path
) -> dict[str, float]:
    """Write the child with its routers corrected, and ``router_fit.json``; its other weights are its own bytes."""
    student, teacher = Checkpoint.open(child), Checkpoint.open(parent)
    changed = changed_layers(student, teacher) if config.tokens else []
    fits: list[LayerFit] = []
    routers: dict[str, Tensor] = {}
    if changed:
        fitting = _Fitting(config, student, teacher, _Tokens.read(config, teacher, calibration), scratch)
        for found, corrected in fitting.from_layer(changed[0]):
            fits.append(found)
            routers |= corrected
    table = scratch / FITS
    table.write_text(json.dumps([asdict(found) for found in fits], indent=1) + "\n")
    better = [found.layer for found in fits if found.is_better]
    step = {"stage": "fit_routers", "tokens": config.tokens, "layers": better}
    rewrite_checkpoint(student, output, routers, step, extra=[table])
    return _metrics(fits)


def _evenly(batches: Sequence[Batch], most: int) -> list[Places]:
    """Of all tokens at most so many, evenly."""
    places = [batch.is_token.nonzero() for batch in batches]
    counts = [len(each) for each in places]
    taken = torch.arange(sum(counts)) % -(-sum(counts) // most) == 0
    return [each[some] for each, some in zip(places, taken.split(counts), strict=True)]


class _Fitting:
    """Parent and child, layer by layer over the same tokens; keeps the states of both between layers."""

    def __init__(
        self, config: FitRoutersConfig, student: Checkpoint, teacher: Checkpoint, tokens: _Tokens, scratch: Path
    ) -> None:
        self._config, self._student, self._teacher, self._tokens = config, student, teacher, tokens
        dtype, self._device = getattr(torch, config.precision), loading.choose_device()
        longest = max(batch.num_positions for batch in tokens.batches)
        self._rotaries = [loading.rotary(model, longest, dtype, self._device) for model in (teacher, student)]
        self._readers = [LayerReader(model, dtype, self._device) for model in (teacher, student)]
        self._offloader = StateOffloader(state_memory_bytes(1), scratch / "states", self._device)
        embedded = loading.embed_each(teacher, [batch.token_ids for batch in tokens.batches], dtype)
        self._theirs = [self._offloader.offload(states) for states in embedded]
        self._ours: list[OffloadedTensor] = []

    def from_layer(self, first: int) -> Iterator[tuple[LayerFit, dict[str, Tensor]]]:
        """Fit every layer with experts from a first one on, in front of which both models are the same.

        Each is returned with its corrected tensors, none if these are not better.
        """
        try:
            for layer in track(range(self._teacher.num_layers), self._teacher.num_layers, "fitting routers, layers"):
                if layer == first:
                    self._ours = [self._offloader.offload(states.read().clone()) for states in self._theirs]
                with torch.no_grad():
                    self._run_parent(layer)
                    found = self._fit(layer) if layer >= first else None
                if found is not None:
                    yield found
        finally:
            for reader in self._readers:
                reader.close()

    def _run_parent(self, layer: int) -> None:
        block, window = self._load(0, layer), self._teacher.architecture.blocks[layer].window
        for index, states in enumerate(self._theirs):
            hidden = layers.run_block(block, states.read().to(self._device), self._rotaries[0], window)
            self._keep(self._theirs, index, hidden)

    def _fit(self, layer: int) -> tuple[LayerFit, dict[str, Tensor]] | None:
        """Correct the child's layer and take its states on; None if it has no experts."""
        block, window = self._load(1, layer), self._student.architecture.blocks[layer].window
        for index, states in enumerate(self._ours):
            attended = layers.attend(block, states.read().to(self._device), self._rotaries[1], window)
            self._keep(self._ours, index, attended)
        found = None if layers.is_dense(block) else self._correct(layer, block)
        for index, states in enumerate(self._ours):
            self._keep(self._ours, index, layers.mix(block, states.read().to(self._device)))
        return found

    def _correct(self, layer: int, block: DecoderLayer) -> tuple[LayerFit, dict[str, Tensor]]:
        """Fit the router in place, where that is better on held-out tokens."""
        own = self._router(layer)
        held_out = self._see(layer, block, self._tokens.held_out)
        before = held_out.error(block)
        correction = fit(block, self._see(layer, block, self._tokens.fitted), self._config.ridge)
        corrected = _apply(own, correction)
        _set_router(block, corrected)
        found = LayerFit(layer, before, held_out.error(block))
        if not found.is_better:
            _set_router(block, own)
        return found, corrected if found.is_better else {}

    def _router(self, layer: int) -> dict[str, Tensor]:
        """The layer's router as stored, by name: its weight, and its bias if it has one."""
        module = f"{layout.layer_prefix(layer)}{self._student.shape.family.router}"
        names = [name for name in (f"{module}.weight", f"{module}.bias") if name in self._student.files]
        return {name: self._student.tensor(name) for name in names}

    def _see(self, layer: int, block: DecoderLayer, places: Sequence[Places]) -> Seen:
        attended, ended = (
            torch.cat([_at(states, rows, self._device) for states, rows in zip(kept, places, strict=True) if len(rows)])
            for kept in (self._ours, self._theirs)
        )
        layers.check_finite(layer, "the child's states", attended)
        layers.check_finite(layer, "the parent's states", ended)
        return see(block, attended, ended)

    def _load(self, model: int, layer: int) -> DecoderLayer:
        """A layer of the parent (0) or of the child (1); the model's next one is read meanwhile."""
        return self._readers[model].load(layer, then=layer + 1 if layer + 1 < self._teacher.num_layers else None)

    def _keep(self, kept: list[OffloadedTensor], index: int, states: Float[Tensor, "batch time hidden"]) -> None:
        kept[index].drop()
        kept[index] = self._offloader.offload(states)


def _at(states: OffloadedTensor, places: Places, device: torch.device) -> Float[Tensor, "token hidden"]:
    """The states of some tokens."""
    read = states.read()
    rows, columns = places.to(read.device).unbind(1)
    return read[rows, columns].to(device)


def _apply(router: Mapping[str, Tensor], correction: Correction) -> dict[str, Tensor]:
    """A router's tensors with the correction in them, in the dtypes that they are stored in."""
    scale, bias = correction.scale.cpu(), correction.bias.cpu()

    def changed(name: str, own: Tensor) -> Tensor:
        return scale * own + bias if name.endswith(".bias") else scale.unsqueeze(1) * own

    return {name: changed(name, tensor.double()).to(tensor.dtype) for name, tensor in router.items()}


def _set_router(block: DecoderLayer, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        getattr(layers.router_of(block), name.rpartition(".")[2]).copy_(tensor)


def _metrics(fits: Sequence[LayerFit]) -> dict[str, float]:
    """The mean over layers before, and after as they are handed on; and both of every layer."""
    metrics = {"num_layers": float(len(fits)), "num_layers_better": float(sum(found.is_better for found in fits))}
    if fits:
        metrics["error_before"] = fmean(found.error_before for found in fits)
        metrics["error_after"] = fmean(min(found.error_before, found.error_after) for found in fits)
    for found in fits:
        metrics[f"error_before_layer_{found.layer:03d}"] = found.error_before
        metrics[f"error_after_layer_{found.layer:03d}"] = found.error_after
    return metrics
