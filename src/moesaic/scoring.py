"""Replace-one-block scoring (paper B, the scores of its block library).

Exactly one block of the parent is replaced by one variant and the rest runs unchanged; ``moesaic.damage`` measures what
changed. The damage of an architecture is the sum over its blocks of ``short + long_weight * long``.

Measured tokens are those whose next token the assistant generated. On the long set only positions at or beyond the
smallest window on offer count: nearer tokens lose nothing to any window. One token set serves all variants of a run, so
that their damages compare. Departure: paper A's long-context data and metric are not known.

Work is shared. A variant of layer i starts from the parent's states at layer i; variants with one window share its
attention; a window no shorter than a batch is no window there; and several variants go through the later layers
together, each of which is loaded once for them. The last layer mixes only measured tokens. Whole-model scoring takes
variants * layers block forwards, this takes about half of them (:func:`num_steps`).
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

from moesaic.architecture import Architecture, Block
from moesaic.blocks import Head, Rotary, attend, mix, router_logits, slice_block
from moesaic.calibration import Batch
from moesaic.damage import Metrics, compare, finish, unchanged
from moesaic.errors import StageError

TOLERANCE = 1e-6
"""Normalised MSE up to which two ways to compute the same thing agree."""
MASKING_TOLERANCE = {torch.float32: TOLERANCE, torch.bfloat16: 1e-4}
"""The same for masking against slicing, whose matrix products differ in shape and so in rounding."""

Sums = list[Tensor]
"""Of one variant, a tensor [sum] per batch; ``moesaic.damage.finish`` makes metrics of their total."""


@dataclass(frozen=True)
class Variant:
    """A block in place of the parent's, and the ids of the parent's experts it keeps."""

    block: Block
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Parent:
    """The model whose blocks are replaced. Layers are loaded when needed and not kept."""

    architecture: Architecture
    load: Callable[[int], GptOssDecoderLayer]
    head: Head
    turns: Rotary


@dataclass(frozen=True)
class Probe:
    """A batch, and which of its positions are measured."""

    batch: Batch
    measured: Bool[Tensor, "batch time"]

    @classmethod
    def of(cls, batch: Batch, first: int = 0) -> "Probe":
        """Measure the positions from ``first`` on whose next token is a response token."""
        measured = F.pad(batch.is_response[:, 1:], (0, 1))
        measured[:, :first] = False
        return cls(batch, measured)

    @property
    def next_ids(self) -> Int[Tensor, " token"]:
        """The token that follows each measured position."""
        return self.batch.token_ids.roll(-1, dims=1)[self.measured]

    def sees(self, block: Block) -> Block:
        """The block this batch cannot tell from ``block``: a window that covers the whole batch is none."""
        covers = block.window is not None and block.window >= self.batch.num_positions
        return Block(block.num_experts, None if covers else block.window)


@dataclass(frozen=True)
class Measurement:
    """What the parent makes of a probe."""

    probe: Probe
    reference: Float[Tensor, "token hidden"]
    """Its final-norm hidden states at the measured positions."""


def num_steps(num_variants: Sequence[int]) -> int:
    """Block forwards with prefix reuse, given each layer's variants: each takes its own layer and all later ones."""
    return sum(count * (len(num_variants) - layer) for layer, count in enumerate(num_variants))


def run_parent(
    parent: Parent, states: Sequence[Tensor], probes: Sequence[Probe]
) -> Generator[None, None, list[Measurement]]:
    """Run the whole parent, one layer at a time, and keep its hidden states at measured positions.

    Args:
        parent: the model.
        states: embedded batches, [batch time hidden], on the host.
        probes: the batches and where to measure them.
    """
    last = parent.architecture.num_layers - 1
    for layer in range(last):
        states = advance(parent, parent.load(layer), layer, states)
        yield
    module = parent.load(last)
    outputs = [
        _continue(parent, module, last, hidden.unsqueeze(0), probe.measured).squeeze(0)
        for hidden, probe in zip(states, probes, strict=True)
    ]
    yield
    return [Measurement(probe, parent.head.normed(hidden).cpu()) for probe, hidden in zip(probes, outputs, strict=True)]


def advance(parent: Parent, module: GptOssDecoderLayer, layer: int, states: Sequence[Tensor]) -> list[Tensor]:
    """The parent's hidden states after one more layer."""
    window = parent.architecture.blocks[layer].window
    device = module.self_attn.sinks.device
    return [mix(module, attend(module, hidden.to(device), parent.turns, window)).cpu() for hidden in states]


def score_layer(
    parent: Parent,
    module: GptOssDecoderLayer,
    layer: int,
    states: Sequence[Tensor],
    measurements: Sequence[Measurement],
    variants: Sequence[Variant],
    variants_per_batch: int,
) -> Generator[None, None, list[Sums]]:
    """Measure every variant of one layer; yields once per variant and layer it has gone through.

    The parent's own block is among the variants. It is run like any other, but on the first batch only: elsewhere its
    sums, and those of variants a batch cannot tell from it, are known.

    Args:
        parent: the model.
        module: the layer to replace, loaded.
        layer: its index.
        states: the parent's hidden states at its input.
        measurements: the same batches at the parent's output.
        variants: what to replace it by, the parent's own block first.
        variants_per_batch: variants that go through the later layers together.

    Returns:
        The sums of every variant, in the order given.
    """
    own = parent.architecture.blocks[layer]
    known: list[dict[Block, Tensor]] = [{item.probe.sees(own): unchanged(item.reference)} for item in measurements]
    del known[0][measurements[0].probe.sees(own)]
    for group in _group(variants, variants_per_batch):
        todo = [_untold(group, item.probe, done) for item, done in zip(measurements, known, strict=True)]
        sums = yield from _score_group(parent, module, layer, states, measurements, todo, len(group))
        for done, wanted, found in zip(known, todo, sums, strict=True):
            done.update(zip(wanted, found, strict=True))
    return [
        [done[item.probe.sees(variant.block)] for item, done in zip(measurements, known, strict=True)]
        for variant in variants
    ]


def _group(variants: Sequence[Variant], size: int) -> list[Sequence[Variant]]:
    """The parent's own block alone, so that it is computed exactly as in the parent; the rest by window."""
    rest = sorted(variants[1:], key=lambda variant: (variant.block.window is not None, -(variant.block.window or 0)))
    return [variants[:1], *(rest[start : start + size] for start in range(0, len(rest), size))]


def _untold(group: Sequence[Variant], probe: Probe, known: dict[Block, Tensor]) -> dict[Block, Variant]:
    """The variants of a group that this batch can tell apart and that are not measured yet, by what it sees of them."""
    return {probe.sees(variant.block): variant for variant in group if probe.sees(variant.block) not in known}


def _score_group(
    parent: Parent,
    module: GptOssDecoderLayer,
    layer: int,
    states: Sequence[Tensor],
    measurements: Sequence[Measurement],
    todo: Sequence[dict[Block, Variant]],
    group_size: int,
) -> Generator[None, None, list[Tensor]]:
    """Replace one block by several variants at once; the states of batch b are [variant, batch, time, hidden]."""
    last = parent.architecture.num_layers - 1
    current = [
        _replace(parent, module, hidden, wanted, item.probe.measured if layer == last else None)
        for hidden, item, wanted in zip(states, measurements, todo, strict=True)
    ]
    yield from [None] * group_size
    for later in range(layer + 1, last + 1):
        module = parent.load(later)
        current = [
            _continue(parent, module, later, hidden, item.probe.measured if later == last else None)
            for hidden, item in zip(current, measurements, strict=True)
        ]
        yield from [None] * group_size
    return [
        compare(parent.head, item.reference, parent.head.normed(hidden).cpu(), item.probe.next_ids)
        if wanted
        else hidden
        for hidden, item, wanted in zip(current, measurements, todo, strict=True)
    ]


def _replace(
    parent: Parent, module: GptOssDecoderLayer, hidden: Tensor, wanted: dict[Block, Variant], measured: Tensor | None
) -> Tensor:
    """The outputs of every variant of one block; at measured positions only, if those are given."""
    outputs = []
    hidden = hidden.to(module.self_attn.sinks.device)
    for window, blocks in groupby(wanted, key=lambda block: block.window):
        attended = attend(module, hidden, parent.turns, window)
        attended = attended if measured is None else attended[measured]
        outputs += [mix(module, attended, wanted[block].kept).cpu() for block in blocks]
    return torch.stack(outputs) if outputs else hidden.new_empty(0, *hidden.shape).cpu()


def _continue(
    parent: Parent, module: GptOssDecoderLayer, layer: int, hidden: Tensor, measured: Tensor | None
) -> Tensor:
    """One unchanged layer for all variants of a batch, [variant, batch, time, hidden]; measured as in ``_replace``."""
    if not len(hidden):
        return hidden
    stacked = hidden.flatten(0, 1).to(module.self_attn.sinks.device)
    attended = attend(module, stacked, parent.turns, parent.architecture.blocks[layer].window).view_as(hidden)
    return mix(module, attended if measured is None else attended[:, measured]).cpu()


def total(sums: Sequence[Tensor]) -> Metrics:
    """The metrics over several batches."""
    return finish(torch.stack(list(sums)).sum(0))


def check_identity(layer: int, metrics: Metrics) -> None:
    """Raise StageError unless the parent's own block, run as a variant, changes nothing."""
    if not metrics["hidden_mse"] <= TOLERANCE:
        raise StageError(
            f"layer {layer}: the parent's own block in its place changes the output by {metrics['hidden_mse']:.2e} "
            f"(normalised MSE, at most {TOLERANCE:.0e}); scores would mean nothing, so scoring stopped"
        )


def check_masking(
    layer: int, module: GptOssDecoderLayer, states: Float[Tensor, "batch time hidden"], kept: Sequence[int]
) -> None:
    """Raise StageError unless leaving experts out of the router equals slicing them off the block.

    Tokens whose last chosen expert leads the next by rounding alone do not count: either may then be chosen.
    """
    states = states.to(module.self_attn.sinks.device)
    decided = _is_decided(module, states, kept)
    sliced = (mix(slice_block(module, kept), states) - states)[decided]
    masked = (mix(module, states, kept) - states)[decided]
    error = ((masked - sliced).double().square().sum() / sliced.double().square().sum()).item()
    tolerance = MASKING_TOLERANCE[states.dtype]
    if not error <= tolerance:
        raise StageError(
            f"layer {layer}: masking all but {len(kept)} experts differs from slicing the others off by {error:.2e} "
            f"(normalised MSE, at most {tolerance:.0e}); scores would not describe the pruned model, so scoring stopped"
        )


def _is_decided(
    module: GptOssDecoderLayer, states: Float[Tensor, "batch time hidden"], kept: Sequence[int]
) -> Bool[Tensor, "batch time"]:
    """Whether a token's top experts among those kept stand out from the next by more than rounding."""
    top_k = module.mlp.router.top_k
    if len(kept) <= top_k:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    normed = module.post_attention_layernorm(states).flatten(0, 1)
    leaders = router_logits(module, normed, kept).topk(top_k + 1, dim=-1).values
    margin = 4 * torch.finfo(leaders.dtype).eps * leaders.abs().amax(-1)
    return (leaders[:, top_k - 1] - leaders[:, top_k] > margin).view(states.shape[:2])
