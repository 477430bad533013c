"""Replace-one-block scoring (paper B, the scores of its block library).

Exactly one block of the parent is replaced by one variant and the rest runs unchanged;
``moesaic.search.score_blocks.damage`` measures what changed. The damage of an architecture is the sum over its blocks
of ``short + long_weight * long``.

Measured tokens are those whose next token the assistant generated. On the long set only positions at or beyond the
smallest window on offer count: nearer tokens lose nothing to any window. One token set serves all variants of a run, so
that their damages compare. Departure: paper A's long-context data and metric are not known.

Work is shared. A variant of layer i starts from the parent's states at layer i; variants with one window share its
attention; a window no shorter than a batch is no window there; and several variants go through the later layers
together, each of which is loaded once for them. The last layer mixes only measured tokens. Whole-model scoring takes
variants * layers block forwards, this takes about half of them (:func:`num_steps`).

One layer is loaded at a time, and :attr:`Parent.load` is told the next so that it can read ahead. Hidden states are
handed to :attr:`Parent.offload`, which decides where they are kept. Batches do not depend on each other, so several
processes can share them: sums are per batch, and their total is taken in the order of the batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesaic.core.config import Balance
from moesaic.core.errors import StageError
from moesaic.data.batches import Batch
from moesaic.models.architecture import Architecture, Block
from moesaic.models.layers import (
    DecoderLayer,
    Head,
    Rotary,
    attend,
    check_finite,
    device_of,
    mix,
    mix_sliced,
    router_scores,
)
from moesaic.search.score_blocks.damage import Metrics, compare, finish, unchanged

TOLERANCE = 1e-6
"""Normalised MSE up to which two ways to compute the same thing agree."""
MASKING_TOLERANCE = {torch.float32: TOLERANCE, torch.bfloat16: 1e-4}
"""Normalised MSE up to which masking and slicing agree; their matrix products differ in shape and so in rounding."""
_MASKING_POSITIONS = 512
"""Of the first sequence, where masking is compared with slicing."""

Sums = list[Tensor]
"""Of one variant, a tensor [sum] per batch; ``damage.finish`` makes metrics of their total."""
OnSteps = Callable[[int], None]
"""Is told how many block forwards have been done since it was last told."""


@dataclass(frozen=True)
class Variant:
    """A block in place of the parent's, and the ids of the parent's experts it keeps."""

    block: Block
    kept: tuple[int, ...]
    channels: Int[Tensor, "expert kept_channel"] | None = field(default=None, compare=False)
    """The channels that it keeps of each of the parent's experts, which follow from the block's width; None: all."""


class Offloaded(Protocol):
    """A tensor that is kept on a device, in host memory or in a file until it is needed again."""

    def read(self) -> Tensor:
        """The tensor, on whatever device it is kept; not to be changed."""
        ...

    def drop(self) -> None:
        """Free its memory; it cannot be read again."""
        ...


class Load(Protocol):
    """Loads layers; the caller holds one at a time."""

    def __call__(self, layer: int, then: int | None = None) -> DecoderLayer:
        """Load a layer; ``then`` is the one that is asked for next, if that is known."""
        ...


@dataclass(frozen=True)
class Parent:
    """The model whose blocks are replaced. Layers are loaded when needed and not kept."""

    architecture: Architecture
    load: Load
    head: Head
    rotary: Rotary
    offload: Callable[[Tensor], Offloaded]

    @property
    def last(self) -> int:
        """The index of the last layer."""
        return self.architecture.num_layers - 1


@dataclass(frozen=True)
class Probe:
    """A batch, and which of its positions are measured."""

    batch: Batch
    measured: Bool[Tensor, "batch time"]
    balance: Balance = "trace"
    """Whether every measured token counts alike, or every sequence."""

    @classmethod
    def of(cls, batch: Batch, first: int = 0, balance: Balance = "trace") -> "Probe":
        """Measure the positions from ``first`` on whose next token is a response token."""
        measured = F.pad(batch.is_response[:, 1:], (0, 1))
        measured[:, :first] = False
        return cls(batch, measured, balance)

    @property
    def next_ids(self) -> Int[Tensor, " token"]:
        """The token that follows each measured position."""
        return self.batch.token_ids.roll(-1, dims=1)[self.measured]

    @property
    def weights(self) -> Float[Tensor, " token"]:
        """What each measured position counts."""
        ones = self.measured.double()
        return (ones if self.balance == "token" else ones / ones.sum(1, keepdim=True))[self.measured]

    def sees(self, block: Block) -> Block:
        """The block this batch cannot tell from ``block``: a window that covers the whole batch is none."""
        covers = block.window is not None and block.window >= self.batch.num_positions
        return replace(block, window=None) if covers else block


@dataclass(frozen=True)
class Measurement:
    """What the parent makes of a probe."""

    probe: Probe
    reference: Offloaded
    """Its final-norm hidden states at the measured positions, [token hidden]."""
    unchanged: Tensor
    """The sums of a child that equals it."""


@dataclass(frozen=True)
class _VariantBatch:
    """One batch of tokens in several children at once, each with another variant of the same layer."""

    index: int
    """Of the batch."""
    variants: dict[Block, Variant]
    """By what the batch sees of them."""
    hidden: Offloaded
    """[variant batch time hidden]; behind the last layer [variant token hidden], measured tokens only."""


def num_steps(num_variants: Sequence[int]) -> int:
    """Block forwards with prefix reuse, given each layer's variants: each takes its own layer and all later ones."""
    return sum(count * (len(num_variants) - layer) for layer, count in enumerate(num_variants))


def run_parent(
    parent: Parent, states: Sequence[Offloaded], probes: Sequence[Probe], on_steps: OnSteps
) -> list[Measurement]:
    """Run the whole parent, one layer at a time, and keep its hidden states at measured positions.

    Args:
        parent: the model.
        states: embedded batches, [batch time hidden]; dropped on the way.
        probes: the batches and where to measure them.
        on_steps: called once per layer.
    """
    for layer in range(parent.last):
        states = advance(parent, layer, states)
        on_steps(1)
    module = parent.load(parent.last, then=0)
    measurements = []
    for hidden, probe in zip(states, probes, strict=True):
        output = _continue(parent, module, parent.last, hidden.read().unsqueeze(0), probe.measured).squeeze(0)
        hidden.drop()
        reference = parent.head.normed(output)
        measurements.append(Measurement(probe, parent.offload(reference), unchanged(reference, probe.weights)))
    on_steps(1)
    return measurements


def advance(parent: Parent, layer: int, states: Sequence[Offloaded]) -> list[Offloaded]:
    """The parent's hidden states after one more layer; those before it are dropped."""
    module = parent.load(layer, then=layer + 1)
    window, device = parent.architecture.blocks[layer].window, device_of(module)
    after = []
    for hidden in states:
        output = mix(module, attend(module, hidden.read().to(device, non_blocking=True), parent.rotary, window))
        hidden.drop()
        after.append(parent.offload(check_finite(layer, "the parent's states", output)))
    return after


def score_layer(
    parent: Parent,
    layer: int,
    states: Sequence[Offloaded],
    measurements: Sequence[Measurement],
    variants: Sequence[Variant],
    variants_per_batch: int,
    on_steps: OnSteps,
    prove: bool = True,
) -> list[Sums]:
    """Measure every variant of one layer.

    The parent's own block is among the variants. It is run like any other, but alone and on the first batch only:
    elsewhere its sums, and those of variants a batch cannot tell from it, are known.

    Args:
        parent: the model.
        layer: the layer to replace.
        states: the parent's hidden states at its input; they are kept.
        measurements: the same batches at the parent's output.
        variants: what to replace it by, the parent's own block first.
        variants_per_batch: variants that go through the later layers together.
        on_steps: told of every variant and layer it has gone through.
        prove: whether the first batch here is the first of all, on which the parent's own block is run.

    Returns:
        The sums of every variant, in the order given.

    Raises:
        StageError: if masking experts differs from slicing them off.
    """
    own = parent.architecture.blocks[layer]
    known: list[dict[Block, Tensor]] = [{item.probe.sees(own): item.unchanged} for item in measurements]
    first: dict[Block, Variant] = {measurements[0].probe.sees(own): variants[0]} if measurements and prove else {}
    _check_all_masks(parent, layer, states, variants)
    groups = _group(variants[1:], variants_per_batch)
    for index, group in enumerate(groups or [[]]):
        unmeasured = [(batch, _unmeasured(group, item.probe, known[batch])) for batch, item in enumerate(measurements)]
        work = [(batch, chosen) for batch, chosen in ([(0, first)] if index == 0 else []) + unmeasured if chosen]
        for batch, blocks, sums in _score_group(parent, layer, states, measurements, work, len(group), on_steps):
            known[batch].update(zip(blocks, sums, strict=True))
    on_steps(parent.last - layer + 1)  # the parent's own block
    return [
        [done[item.probe.sees(variant.block)] for item, done in zip(measurements, known, strict=True)]
        for variant in variants
    ]


def _check_all_masks(parent: Parent, layer: int, states: Sequence[Offloaded], variants: Sequence[Variant]) -> None:
    if states and not parent.architecture.blocks[layer].is_dense:
        module = parent.load(layer, then=layer)
        sample = states[0].read()[:1, :_MASKING_POSITIONS].to(device_of(module))
        for kept, top_k in sorted({(variant.kept, variant.block.experts_per_token) for variant in variants}):
            check_masking(layer, module, sample, kept, top_k)


def _group(variants: Sequence[Variant], size: int) -> list[Sequence[Variant]]:
    """Split variants into groups of ``size``, ordered so that those with the same window are neighbours."""
    ordered = sorted(variants, key=lambda variant: (variant.block.window is not None, -(variant.block.window or 0)))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _unmeasured(group: Sequence[Variant], probe: Probe, known: dict[Block, Tensor]) -> dict[Block, Variant]:
    """The variants of a group that this batch can tell apart and that are not measured yet, by what it sees of them."""
    return {probe.sees(variant.block): variant for variant in group if probe.sees(variant.block) not in known}


def _score_group(
    parent: Parent,
    layer: int,
    states: Sequence[Offloaded],
    measurements: Sequence[Measurement],
    work: Sequence[tuple[int, dict[Block, Variant]]],
    group_size: int,
    on_steps: OnSteps,
) -> list[tuple[int, dict[Block, Variant], Tensor]]:
    """Replace one block by several variants at once, given by batch; the sums of each batch's variants."""
    if not work:
        on_steps(group_size * (parent.last - layer + 1))
        return []
    batches = _replace_all(parent, layer, states, measurements, work)
    on_steps(group_size)
    for later in range(layer + 1, parent.last + 1):
        batches = _continue_all(parent, layer, later, measurements, batches)
        on_steps(group_size)
    results = []
    for batch in batches:
        item, children = measurements[batch.index], parent.head.normed(batch.hidden.read())
        sums = compare(parent.head, item.reference.read(), children, item.probe.next_ids, item.probe.weights)
        batch.hidden.drop()
        results.append((batch.index, batch.variants, sums))
    return results


def _replace_all(
    parent: Parent,
    layer: int,
    states: Sequence[Offloaded],
    measurements: Sequence[Measurement],
    work: Sequence[tuple[int, dict[Block, Variant]]],
) -> list[_VariantBatch]:
    """Run the replaced layer: every batch through each of its variants."""
    module = parent.load(layer, then=min(layer + 1, parent.last))
    replaced = []
    for index, variants in work:
        measured = measurements[index].probe.measured if layer == parent.last else None
        hidden = _replace(parent, module, states[index].read(), variants, measured)
        replaced.append(_VariantBatch(index, variants, parent.offload(hidden)))
    return replaced


def _continue_all(
    parent: Parent, layer: int, later: int, measurements: Sequence[Measurement], batches: Sequence[_VariantBatch]
) -> list[_VariantBatch]:
    """Run one unchanged layer behind the replaced one, over all batches."""
    module = parent.load(later, then=later + 1 if later < parent.last else layer)
    after = []
    for batch in batches:
        measured = measurements[batch.index].probe.measured if later == parent.last else None
        hidden = _continue(parent, module, later, batch.hidden.read(), measured)
        batch.hidden.drop()
        after.append(_VariantBatch(batch.index, batch.variants, parent.offload(hidden)))
    return after


def _replace(
    parent: Parent, module: DecoderLayer, hidden: Tensor, variants: dict[Block, Variant], measured: Tensor | None
) -> Tensor:
    """The outputs of every variant of one block; at measured positions only, if those are given."""
    outputs = []
    hidden = hidden.to(device_of(module), non_blocking=True)
    for window, blocks in groupby(variants, key=lambda block: block.window):
        attended = attend(module, hidden, parent.rotary, window)
        attended = attended if measured is None else attended[measured]
        for variant in (variants[block] for block in blocks):
            outputs.append(mix(module, attended, variant.kept, variant.block.experts_per_token, variant.channels))
    return torch.stack(outputs)


def _continue(parent: Parent, module: DecoderLayer, layer: int, hidden: Tensor, measured: Tensor | None) -> Tensor:
    """One unchanged layer for all variants of a batch, [variant, batch, time, hidden]; measured as in ``_replace``."""
    stacked = hidden.flatten(0, 1).to(device_of(module), non_blocking=True)
    attended = attend(module, stacked, parent.rotary, parent.architecture.blocks[layer].window).view(hidden.shape)
    return mix(module, attended if measured is None else attended[:, measured])


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
    layer: int, module: DecoderLayer, states: Float[Tensor, "batch time hidden"], kept: Sequence[int], top_k: int
) -> None:
    """Raise StageError unless leaving experts out of the router equals slicing them off the block.

    Both with ``top_k`` experts per token.

    Tokens whose last chosen expert leads the next by rounding alone do not count: either may then be chosen.
    """
    decided = _is_decided(module, states, kept, top_k)
    sliced = (mix_sliced(module, states, kept, top_k) - states)[decided]
    masked = (mix(module, states, kept, top_k) - states)[decided]
    error = ((masked - sliced).double().square().sum() / sliced.double().square().sum()).item()
    tolerance = MASKING_TOLERANCE[states.dtype]
    if not error <= tolerance:
        raise StageError(
            f"layer {layer}: masking all but {len(kept)} experts differs from slicing the others off by {error:.2e} "
            f"(normalised MSE, at most {tolerance:.0e}); scores would not describe the pruned model, so scoring stopped"
        )


def _is_decided(
    module: DecoderLayer, states: Float[Tensor, "batch time hidden"], kept: Sequence[int], top_k: int
) -> Bool[Tensor, "batch time"]:
    """Whether a token's top experts among those kept stand out from the next by more than rounding."""
    if len(kept) <= top_k:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    normed = module.post_attention_layernorm(states).flatten(0, 1)
    rows = torch.tensor(list(kept), device=normed.device)
    leaders = router_scores(module, normed, rows).choice.topk(top_k + 1, dim=-1).values
    margin = 4 * torch.finfo(leaders.dtype).eps * leaders.abs().amax(-1)
    return (leaders[:, top_k - 1] - leaders[:, top_k] > margin).view(states.shape[:2])
