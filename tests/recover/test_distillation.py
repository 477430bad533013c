"""The distillation loss against hand-worked numbers and against a plain formula over full logits in float64."""

import math

import pytest
import torch
from torch import Tensor

from moesaic.recover.distill.loss import LossParts, States, distillation_loss, draw_compared
from moesaic.recover.distill.stage import DistillConfig
from tests.closeness import assert_near

TOKENS, HIDDEN, VOCAB, LAYERS = 23, 8, 50, 3
CONFIG = DistillConfig(lm_weight=0.5, hidden_weight=2.0, temperature=2.0, logits_chunk_tokens=5)


def draw_states(seed: int, dtype: torch.dtype = torch.float32, learns: bool = False) -> States:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(learns)

    return States([draw(TOKENS, HIDDEN) for _ in range(LAYERS)], draw(TOKENS, HIDDEN), draw(VOCAB, HIDDEN))


def leaves(states: States) -> list[Tensor]:
    return [*states.layers, states.final, states.head]


def convert(states: States, dtype: torch.dtype) -> States:
    """A copy whose tensors are leaves of their own."""
    *layers, final, head = (leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for leaf in leaves(states))
    return States(layers, final, head)


def gradients(parts: LossParts, states: States, config: DistillConfig) -> list[Tensor]:
    return list(torch.autograd.grad(parts.total(config), leaves(states)))


def plain_loss(child: States, parent: States, labels: Tensor, config: DistillConfig) -> LossParts:
    """The formula as it is written, all logits at once."""
    logits, goal = child.final @ child.head.T, parent.final @ parent.head.T
    t = config.temperature
    q, p = (logits / t).softmax(-1), (goal / t).softmax(-1)
    kl = t**2 * (p * (p.log() - q.log())).sum()
    cosines = [(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in zip(child.layers, parent.layers)]  # noqa: B905
    hidden = sum((1 - cosine).sum() for cosine in cosines) / len(cosines)
    lm = -logits.softmax(-1).log()[torch.arange(len(labels)), labels].sum()
    agreeing = (logits.argmax(-1) == goal.argmax(-1)).sum()
    return LossParts(kl, hidden, lm, agreeing, len(labels))


LABELS = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(9))


def test_two_tokens_by_hand() -> None:
    """Token 1: predictions swapped, states at a right angle, then parallel; token 2: equal, then opposite."""
    head = torch.eye(2)
    parent = States(
        [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [3.0, 0.0]])],
        torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]]),
        head,
    )
    child = States(
        [torch.tensor([[0.0, 5.0], [0.0, 7.0]]), torch.tensor([[2.0, 2.0], [-1.0, 0.0]])],
        torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]]),
        head,
    )
    parts = distillation_loss(child, parent, torch.tensor([1, 1]), DistillConfig(lm_weight=1.0))
    assert parts.kl.item() == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1 / 3), rel=1e-5)
    assert parts.hidden.item() == pytest.approx(((1 + 0) + (0 + 2)) / 2)
    assert parts.lm.item() == pytest.approx(2 * math.log(4 / 3))
    assert parts.top1.item() == 1
    assert parts.num_tokens == 2
    weighted = parts.total(DistillConfig(kl_weight=10, hidden_weight=100, lm_weight=1000))
    assert weighted.item() == pytest.approx(10 * parts.kl.item() + 150 + 1000 * parts.lm.item())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_are_those_of_the_plain_formula(temperature: float) -> None:
    config = CONFIG.model_copy(update={"temperature": temperature})
    child, parent = draw_states(0, learns=True), draw_states(1)
    parts = distillation_loss(child, parent, LABELS, config)
    exact_child = convert(child, torch.float64)
    exact = plain_loss(exact_child, convert(parent, torch.float64), LABELS, config)
    for name in ("kl", "hidden", "lm", "top1"):
        assert getattr(parts, name).item() == pytest.approx(getattr(exact, name).item(), rel=1e-5), name
    for found, expected in zip(gradients(parts, child, config), gradients(exact, exact_child, config), strict=True):
        assert_near(found, expected)


def test_chunk_size_does_not_matter() -> None:
    child, parent = draw_states(0, learns=True), draw_states(1)
    results = []
    for size in (1, 7, TOKENS, 1000):
        config = CONFIG.model_copy(update={"logits_chunk_tokens": size})
        parts = distillation_loss(child, parent, LABELS, config)
        results.append([parts.total(config).detach(), parts.top1, *gradients(parts, child, config)])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert_near(found, expected)


def test_a_child_that_equals_its_parent_has_no_loss_and_no_gradient() -> None:
    child = draw_states(0, learns=True)
    config = CONFIG.model_copy(update={"lm_weight": 0.0})
    parts = distillation_loss(child, convert(child, torch.float32), LABELS, config)
    assert (parts.kl.item(), parts.hidden.item(), parts.lm.item()) == (0, 0, 0)
    assert parts.top1.item() == TOKENS
    for gradient in gradients(parts, child, config):
        assert gradient.abs().max() < 1e-5  # float32 leaves 84 steps of sum(p) - 1, whose terms sum to 1


def test_the_parent_gets_no_gradient() -> None:
    child, parent = draw_states(0, learns=True), draw_states(1, learns=True)
    distillation_loss(child, parent, LABELS, CONFIG).total(CONFIG).backward()
    assert all(leaf.grad is None for leaf in leaves(parent))
    assert all(leaf.grad is not None for leaf in leaves(child))


def test_bfloat16_is_summed_in_float32() -> None:
    """Between the same numbers in bfloat16 and float32 only the rounding of the gradients themselves remains."""
    child, parent = draw_states(0, torch.bfloat16, learns=True), draw_states(1, torch.bfloat16)
    precise = convert(child, torch.float32)
    found = distillation_loss(child, parent, LABELS, CONFIG)
    expected = distillation_loss(precise, convert(parent, torch.float32), LABELS, CONFIG)
    for name in ("kl", "hidden", "lm", "top1"):
        assert getattr(found, name).dtype == torch.float32
        assert getattr(found, name).item() == getattr(expected, name).item(), name
    for rounded, gradient in zip(gradients(found, child, CONFIG), gradients(expected, precise, CONFIG), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert_near(rounded, gradient, 1.01 * 2**-8)  # half a step of bfloat16, and what float32 may shift it by


def test_memory_does_not_hold_the_logits_of_all_tokens() -> None:
    """What the graph keeps, and the largest tensor that ever exists, forward and backward."""
    tokens, vocab, chunk = 512, 400, 16
    config = CONFIG.model_copy(update={"logits_chunk_tokens": chunk})
    child_final = torch.randn(tokens, HIDDEN, requires_grad=True)
    child = States([child_final], child_final, torch.randn(vocab, HIDDEN, requires_grad=True))
    parent = States([torch.randn(tokens, HIDDEN)], torch.randn(tokens, HIDDEN), torch.randn(vocab, HIDDEN))
    kept = Sizes()
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor), LargestTensor() as largest:
        total = distillation_loss(child, parent, torch.zeros(tokens, dtype=torch.long), config).total(config)
        assert kept.num_elements < 3 * (tokens + vocab) * HIDDEN
        total.backward()
    assert largest.num_elements == chunk * vocab


class Sizes:
    """Elements of the different tensors a graph keeps."""

    def __init__(self) -> None:
        self._of_storage: dict[int, int] = {}

    def note(self, tensor: Tensor) -> Tensor:
        self._of_storage[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    @property
    def num_elements(self) -> int:
        return sum(self._of_storage.values())


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_no_response_tokens_and_no_gradients_are_fine() -> None:
    """A rank may get rows without a response token; evaluation runs without a graph."""
    child, parent = draw_states(0, learns=True), draw_states(1)
    none = States([layer[:0] for layer in child.layers], child.final[:0], child.head)
    of_parent = States([layer[:0] for layer in parent.layers], parent.final[:0], parent.head)
    parts = distillation_loss(none, of_parent, LABELS[:0], CONFIG)
    parts.total(CONFIG).backward()
    assert parts.num_tokens == 0 and parts.total(CONFIG).item() == 0
    assert child.head.grad is not None and not child.head.grad.any()
    with torch.no_grad():
        assert not distillation_loss(child, parent, LABELS, CONFIG).kl.requires_grad


def test_models_of_different_depth_are_refused() -> None:
    child, parent = draw_states(0), draw_states(1)
    with pytest.raises(ValueError, match="zip"):
        distillation_loss(child, States(parent.layers[:-1], parent.final, parent.head), LABELS, CONFIG)


def test_without_its_weight_the_cross_entropy_is_not_computed() -> None:
    child, parent = draw_states(0), draw_states(1)
    out_of_range = torch.full((TOKENS,), VOCAB)
    assert distillation_loss(child, parent, out_of_range, DistillConfig(lm_weight=0)).lm.item() == 0
    with pytest.raises(IndexError):
        distillation_loss(child, parent, out_of_range, DistillConfig(lm_weight=1))


def test_weights_count_tokens_more_or_less() -> None:
    """A token of weight 3 counts as three such tokens, one of weight 0 not at all."""
    child, parent = draw_states(0, learns=True), draw_states(1)
    weights = torch.ones(TOKENS)
    weights[4], weights[7] = 3, 0
    found = distillation_loss(child, parent, LABELS, CONFIG, weights)
    places = [4, 4, *(place for place in range(TOKENS) if place != 7)]

    def chosen(states: States) -> States:
        return States([layer[places] for layer in states.layers], states.final[places], states.head)

    expected = distillation_loss(chosen(child), chosen(parent), LABELS[places], CONFIG)
    for name in ("kl", "hidden", "lm", "top1"):
        assert_near(getattr(found, name), getattr(expected, name), name=name)
    for ours, theirs in zip(gradients(found, child, CONFIG), gradients(expected, child, CONFIG), strict=True):
        assert_near(ours, theirs)


def test_states_of_drawn_tokens_stand_for_all_of_them() -> None:
    """Over all draws of one token the term and its gradient are, on average, those of every token."""
    child, parent = draw_states(0, learns=True), draw_states(1)
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3))
    whole = distillation_loss(child, parent, LABELS, CONFIG, weights)
    expected = torch.autograd.grad(whole.hidden, list(child.layers))
    found = [torch.zeros_like(layer) for layer in child.layers]
    mean = 0.0
    for token in range(TOKENS):
        chosen = torch.tensor([token])

        def at(states: States, chosen: Tensor = chosen) -> States:
            return States([layer[chosen] for layer in states.layers], states.final, states.head)

        part = distillation_loss(at(child), at(parent), LABELS, CONFIG, weights, chosen)
        mean += part.hidden.item() / TOKENS
        for sum_, gradient in zip(found, torch.autograd.grad(part.hidden, list(child.layers)), strict=True):
            sum_ += gradient / TOKENS
        assert_near(part.kl, whole.kl)
    assert mean == pytest.approx(whole.hidden.item(), rel=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs)


def test_a_draw_repeats_itself_and_takes_all_where_they_are_few() -> None:
    config = CONFIG.model_copy(update={"hidden_tokens": 5, "seed": 1})
    drawn = draw_compared(40, config, 3, 0)
    assert len(set(drawn.tolist())) == 5 and drawn.tolist() == sorted(drawn.tolist()) and drawn.max() < 40
    assert torch.equal(drawn, draw_compared(40, config, 3, 0))
    assert not torch.equal(drawn, draw_compared(40, config, 4, 0))
    assert draw_compared(4, config, 3).tolist() == [0, 1, 2, 3]
    assert draw_compared(0, config, 3).tolist() == []
