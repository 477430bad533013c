"""The damage of whole assemblies: the same tokens and measures as for single blocks, with every block replaced.

All assemblies of a call go through a layer together, so that it is loaded once for them, and those that begin alike
share their states up to the layer where they differ.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moesaic.models.layers import attend, check_finite, device_of, mix
from moesaic.search.score_blocks.damage import compare
from moesaic.search.score_blocks.scoring import Measurement, Offloaded, OnSteps, Parent, Sums, Variant

Beginning = tuple[Variant, ...]
"""The blocks of an assembly's first layers."""


def run_assemblies(
    parent: Parent,
    states: Sequence[Offloaded],
    measurements: Sequence[Measurement],
    assemblies: Sequence[Beginning],
    on_steps: OnSteps,
) -> list[Sums]:
    """Measure assemblies against their parent.

    Args:
        parent: the model.
        states: embedded batches, [batch time hidden]; dropped on the way.
        measurements: the same batches at the parent's output.
        assemblies: one variant per layer each.
        on_steps: told of every assembly and layer it has gone through.

    Returns:
        The sums of every assembly, in the order given.

    Raises:
        StageError: if states stop being finite.
    """
    held: list[Mapping[Beginning, Offloaded]] = [{(): hidden} for hidden in states]
    for layer in range(parent.last + 1):
        beginnings = list(dict.fromkeys(assembly[: layer + 1] for assembly in assemblies))
        held = _advance(parent, layer, held, measurements, beginnings)
        on_steps(len(assemblies))
    results: list[Sums] = [[] for _ in assemblies]
    for item, outputs in zip(measurements, held, strict=True):
        children = torch.stack([parent.head.normed(outputs[assembly].read()) for assembly in assemblies])
        sums = compare(parent.head, item.reference.read(), children, item.probe.next_ids, item.probe.weights)
        for result, own in zip(results, sums, strict=True):
            result.append(own)
        for hidden in outputs.values():
            hidden.drop()
    return results


def _advance(
    parent: Parent,
    layer: int,
    held: Sequence[Mapping[Beginning, Offloaded]],
    measurements: Sequence[Measurement],
    beginnings: Sequence[Beginning],
) -> list[Mapping[Beginning, Offloaded]]:
    """The states of all beginnings after one more layer; those before it are dropped."""
    module = parent.load(layer, then=layer + 1 if layer < parent.last else None)
    device = device_of(module)
    after: list[Mapping[Beginning, Offloaded]] = []
    for before, item in zip(held, measurements, strict=True):
        outputs = {}
        for beginning in beginnings:
            variant = beginning[-1]
            hidden = before[beginning[:-1]].read().to(device, non_blocking=True)
            attended: Tensor = attend(module, hidden, parent.rotary, variant.block.window)
            if layer == parent.last:
                attended = attended[item.probe.measured]
            output = mix(module, attended, variant.kept, variant.block.experts_per_token, variant.channels)
            outputs[beginning] = parent.offload(check_finite(layer, f"the states of {variant.block.label}", output))
        for state in before.values():
            state.drop()
        after.append(outputs)
    return after
