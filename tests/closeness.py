"""Comparisons that hold on every processor and with every number of threads.

A sum rounds at the size of what is summed, not of what is left of it, so an error is measured against the largest value
of its tensor. Greedy replies of two code paths may part only where the model is all but undecided.
So may the experts of a token, and with them all that follows: such rows are not compared (``assert_experts_decided``).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROUNDING = 2e-5
"""Of the largest value: 170 steps of float32, what sums of some hundred terms leave of it after four layers."""
NEAR_TIE = 1e-4
"""Of the largest logit: five times what two float32 logits, each rounded like this, can change places by."""


def assert_near(found: Tensor, expected: Tensor, error: float = ROUNDING, name: str = "value") -> None:
    """No value is off by more than ``error`` times the largest magnitude that is expected."""
    __tracebackhide__ = True
    assert found.shape == expected.shape, f"{name} has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if not expected.numel():
        return
    exact = expected.detach().double()
    errors = (found.detach().double() - exact).abs()
    allowed = error * float(exact.abs().max())
    worst = torch.unravel_index(torch.where(errors.isnan(), torch.inf, errors).argmax(), errors.shape)
    place = tuple(int(index) for index in worst)
    assert float(errors[place]) <= allowed, (
        f"{name} at {place}: {float(found[place]):.9g} instead of {float(exact[place]):.9g}, "
        f"off by {float(errors[place]):.3g} where {allowed:.3g} is allowed"
    )


def assert_same_replies(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    tie: float = NEAR_TIE,
) -> None:
    """Greedy replies are equal up to the first token, if any, at which two tokens' logits are within ``tie``."""
    __tracebackhide__ = True
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        if tuple(ours) == tuple(theirs):
            continue
        place = next((index for index, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1), None)
        assert place is not None, f"one reply is the other's beginning: {list(ours)} and {list(theirs)}"
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *ours[:place]]])).logits[0, -1].double()
        gap = float(logits.max() - logits[[ours[place], theirs[place]]].min())
        allowed = tie * float(logits.abs().max())
        assert gap <= allowed, (
            f"token {place} of the reply to {list(prompt)} is {ours[place]} instead of {theirs[place]}: "
            f"their logits are {gap:.3g} from the highest, a near tie is at most {allowed:.3g}"
        )


def assert_decided(model: PreTrainedModel, prompt: Sequence[int], reply: Sequence[int], tie: float = NEAR_TIE) -> None:
    """No token of a greedy reply was chosen at a near tie, so every way of computing it gives this text."""
    __tracebackhide__ = True
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].double()
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    gap, place = (first - second).min(0)
    allowed = tie * float(logits[place].abs().max())
    assert float(gap) > allowed, (
        f"token {int(place)} of the reply to {list(prompt)} is a near tie: "
        f"the two highest logits are {float(gap):.3g} apart, at least {allowed:.3g} is needed; choose another prompt"
    )


def assert_experts_decided(model: PreTrainedModel, row: Mapping[str, Tensor], tie: float = NEAR_TIE) -> None:
    """No token of a row chooses its experts at a near tie, so every way of computing it takes the same ones."""
    __tracebackhide__ = True
    gaps: list[float] = []

    def look(router: torch.nn.Module, given: tuple[Tensor, ...], _: object) -> None:
        states = given[0].flatten(0, -2)
        logits = torch.nn.functional.linear(states, router.weight, router.bias).double()
        if router.top_k < logits.shape[-1]:
            last, first_out = logits.topk(router.top_k + 1, dim=-1).values[:, -2:].unbind(-1)
            gaps.append(float((last - first_out).min() / logits.abs().max()))

    handles = [layer.mlp.router.register_forward_hook(look) for layer in model.model.layers]
    with torch.inference_mode():
        model(**row, use_cache=False)
    for handle in handles:
        handle.remove()
    assert min(gaps) > tie, (
        f"in layer {gaps.index(min(gaps))} an expert is chosen by {min(gaps):.3g} of the largest logit, "
        f"at least {tie:.3g} is needed; choose other tokens"
    )
