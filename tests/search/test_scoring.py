"""Replace-one-block scoring against whole models that really hold the replaced block."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.core.config import Balance
from moesaic.core.errors import StageError
from moesaic.data.batches import TokenSequence, make_batches
from moesaic.models import layers, loading
from moesaic.models.architecture import Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.streaming import LayerReader, StateOffloader
from moesaic.search.refine_architecture.assemblies import run_assemblies
from moesaic.search.score_blocks import damage, scoring
from moesaic.search.score_blocks.scoring import Parent, Probe, Variant
from tests.closeness import assert_near

WHOLE = tuple(range(8))
CHANNELS = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(expert)) for expert in range(8)])
"""Of every expert."""
VARIANTS = [
    Variant(Block(8, 2, 64, None), WHOLE),
    Variant(Block(8, 2, 64, 4), WHOLE),
    Variant(Block(8, 2, 64, 20), WHOLE),
    Variant(Block(3, 2, 64, None), (1, 2, 6)),
    Variant(Block(3, 2, 64, 4), (1, 2, 6)),
    Variant(Block(3, 2, 64, 20), (1, 2, 6)),
    Variant(Block(8, 1, 64, 4), WHOLE),
    Variant(Block(3, 1, 64, None), (1, 2, 6)),
    Variant(Block(8, 2, 32, None), WHOLE, CHANNELS[:, :32]),
    Variant(Block(3, 1, 16, None), (1, 2, 6), CHANNELS[:, :16]),
]
"""For a full layer; a window of 20 covers the batch of short sequences and not the long one's."""
LOGIT_STEPS = 1e-5
"""Of a token: 80 steps of float32. A log-probability is summed from logits near 10, whose rounding a mean keeps."""


@pytest.fixture(scope="module")
def parent(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Parent:
    cpu = torch.device("cpu")
    return Parent(
        tiny_checkpoint.architecture,
        LayerReader(tiny_checkpoint, torch.float32, cpu).load,
        loading.load_head(tiny_checkpoint),
        loading.rotary(tiny_checkpoint, 64),
        StateOffloader(2**30, tmp_path_factory.mktemp("states"), cpu).offload,
    )


@pytest.fixture(scope="module", params=["token", "trace"])
def probes(request: pytest.FixtureRequest) -> list[Probe]:
    """Two batches: of 12 and 15 tokens, and of 30 and 33."""
    generator = torch.Generator().manual_seed(8)
    sequences = [
        TokenSequence(
            tuple(torch.randint(0, 64, (length,), generator=generator).tolist()), (False,) * 6 + (True,) * (length - 6)
        )
        for length in (12, 15, 30, 33)
    ]
    return [Probe.of(batch, balance=request.param) for batch in make_batches(sequences, 66)]


def score(
    parent: Parent, checkpoint: Checkpoint, probes: list[Probe], layer: int, variants: list[Variant], group: int
) -> list[scoring.Sums]:
    embedded = loading.embed(checkpoint, [probe.batch.token_ids for probe in probes])
    steps: list[int] = []
    measurements = scoring.run_parent(parent, [parent.offload(hidden) for hidden in embedded], probes, steps.append)
    assert sum(steps) == 4
    states = [parent.offload(hidden) for hidden in embedded]
    for before in range(layer):
        states = scoring.advance(parent, before, states)
    steps.clear()
    sums = scoring.score_layer(parent, layer, states, measurements, variants, group, steps.append)
    assert sum(steps) == len(variants) * (4 - layer)
    return sums


def whole_forward(checkpoint: Checkpoint, tokens: Tensor, layer: int, variant: Variant | None) -> Tensor:
    """Final-norm hidden states of a model in which one block was physically replaced; no reuse of any kind."""
    (hidden,) = loading.embed(checkpoint, [tokens])
    rotary = loading.rotary(checkpoint, 64)
    for index, own in enumerate(checkpoint.architecture.blocks):
        block, window = loading.load_block(checkpoint, index), own.window
        if variant is not None and index == layer:
            channels = None if variant.channels is None else variant.channels[list(variant.kept)]
            block, window = layers.slice_block(block, variant.kept, channels), variant.block.window
            block.mlp.router.top_k = variant.block.experts_per_token
        hidden = layers.run_block(block, hidden, rotary, window)
    return loading.load_head(checkpoint).norm(hidden)


def naive_metrics(checkpoint: Checkpoint, probes: list[Probe], layer: int, variant: Variant) -> dict[str, float]:
    """The formulas of ``moesaic.search.score_blocks.damage``, token by token."""
    head = loading.load_head(checkpoint).weight
    rows, weights = [], []
    for probe in probes:
        tokens = probe.batch.token_ids
        ours, theirs = whole_forward(checkpoint, tokens, layer, variant), whole_forward(checkpoint, tokens, layer, None)
        for row, time in probe.measured.nonzero().tolist():
            weights.append(1 / int(probe.measured[row].sum()) if probe.balance == "trace" else 1.0)
            child, parent = ours[row, time], theirs[row, time]
            log_q, log_p = (child @ head.T).log_softmax(0), (parent @ head.T).log_softmax(0)
            target = tokens[row, time + 1]
            divergence = (log_p.exp() * (log_p - log_q)).sum()
            cosine, differs = F.cosine_similarity(child, parent, 0), log_q.argmax() != log_p.argmax()
            error, energy = ((child - parent) ** 2).sum(), (parent**2).sum()
            rows.append((error, energy, divergence, log_p[target] - log_q[target], 1 - cosine, float(differs)))
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    error, energy, *means = (share @ torch.tensor(rows, dtype=torch.float64)).tolist()
    return dict(zip(damage.METRICS, [error / energy, *means], strict=True))


def test_scores_equal_those_of_really_replaced_models(parent: Parent, tiny_checkpoint: Checkpoint, probes: list[Probe]):
    for layer in (1, 3):
        sums = score(parent, tiny_checkpoint, probes, layer, VARIANTS, group=3)
        for variant, parts in zip(VARIANTS, sums, strict=True):
            expected = naive_metrics(tiny_checkpoint, probes, layer, variant)
            assert scoring.total(parts) == pytest.approx(expected, rel=1e-3, abs=LOGIT_STEPS), (layer, variant)
            assert variant is VARIANTS[0] or expected["hidden_mse"] > 1e-4


def test_a_window_layer(parent: Parent, tiny_checkpoint: Checkpoint, probes: list[Probe]):
    variants = [Variant(Block(8, 2, 64, 8), WHOLE), Variant(Block(5, 2, 64, 8), (0, 2, 3, 4, 7))]
    identity, pruned = score(parent, tiny_checkpoint, probes, 0, variants, group=4)
    assert scoring.total(identity)["hidden_mse"] == 0
    assert scoring.total(pruned) == pytest.approx(
        naive_metrics(tiny_checkpoint, probes, 0, variants[1]), rel=1e-3, abs=LOGIT_STEPS
    )


def test_an_assembly_of_one_replaced_block_scores_as_the_block(
    parent: Parent, tiny_checkpoint: Checkpoint, probes: list[Probe]
):
    """Narrower experts, of which some are left out, and one per token."""
    (alone,) = score(parent, tiny_checkpoint, probes, 1, [VARIANTS[0], VARIANTS[-1]], group=1)[1:]
    embedded = loading.embed(tiny_checkpoint, [probe.batch.token_ids for probe in probes])
    measured = scoring.run_parent(parent, [parent.offload(hidden) for hidden in embedded], probes, lambda _: None)
    assembly = [Variant(block, WHOLE) for block in tiny_checkpoint.architecture.blocks]
    assembly[1] = VARIANTS[-1]
    states = [parent.offload(hidden) for hidden in embedded]
    (together,) = run_assemblies(parent, states, measured, [tuple(assembly)], lambda _: None)
    assert scoring.total(together) == pytest.approx(scoring.total(alone), rel=1e-4, abs=LOGIT_STEPS)


def test_groups_change_nothing(parent: Parent, tiny_checkpoint: Checkpoint, probes: list[Probe]):
    alone = score(parent, tiny_checkpoint, probes, 1, VARIANTS, group=1)
    together = score(parent, tiny_checkpoint, probes, 1, VARIANTS, group=5)
    for one, other in zip(alone, together, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-4, abs=LOGIT_STEPS * float(ours[-1]))


def test_what_a_batch_cannot_tell_apart_is_computed_once(
    parent: Parent, tiny_checkpoint: Checkpoint, probes: list[Probe], monkeypatch: pytest.MonkeyPatch
):
    """The short batch sees 8 of 10 variants, the long one all; only the first batch runs the parent's own block."""
    mixed: list[int] = []
    mix = scoring.mix

    def counting(block, attended, kept=None, *rest):
        mixed.append(0 if kept is None else 1)
        return mix(block, attended, kept, *rest)

    monkeypatch.setattr(scoring, "mix", counting)
    monkeypatch.setattr(scoring, "check_masking", lambda *_: None)
    score(parent, tiny_checkpoint, probes, 1, VARIANTS, group=4)
    assert sum(mixed) == 8 + 9


def test_measured_positions_precede_response_tokens(probes: list[Probe]):
    batch = probes[0].batch
    assert probes[0].measured.nonzero().tolist() == [[0, t] for t in range(5, 11)] + [[1, t] for t in range(5, 14)]
    assert Probe.of(batch, first=12).measured.nonzero().tolist() == [[1, 12], [1, 13]]
    assert probes[0].next_ids.tolist() == [*batch.token_ids[0, 6:12].tolist(), *batch.token_ids[1, 6:15].tolist()]


def test_metrics_by_hand():
    """One token, two words, identity head, h = (3, 0), h' = (0, 4): error 25 of energy 9, orthogonal, other word."""
    head = layers.Head(torch.nn.Identity(), torch.eye(2))
    parent, children, weights = torch.tensor([[3.0, 0.0]]), torch.tensor([[[0.0, 4.0]]]), torch.ones(1).double()
    sums = damage.compare(head, parent, children, torch.tensor([0]), weights)
    p, q = torch.tensor([3.0, 0.0]).softmax(0), torch.tensor([0.0, 4.0]).softmax(0)
    assert damage.finish(sums[0]) == pytest.approx(
        {
            "hidden_mse": 25 / 9,
            "kl": float((p * (p / q).log()).sum()),
            "lm_loss": float((p[0] / q[0]).log()),
            "cosine": 1.0,
            "top1": 1.0,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(("balance", "share"), [("token", 1 / 5), ("trace", 1 / 2)])
def test_a_short_reply_counts_as_much_as_a_long_one(balance: Balance, share: float):
    """A reply of one token changes its only word, one of four tokens none: a fifth of tokens, half of replies."""
    sequences = [TokenSequence((0,) * (1 + length), (False,) + (True,) * length) for length in (1, 4)]
    (batch,) = make_batches(sequences, 100)
    probe = Probe.of(batch, balance=balance)
    parent = torch.tensor([[3.0, 0.0]] * 5)
    children = parent.clone().unsqueeze(0)
    children[0, 0] = torch.tensor([0.0, 4.0])
    sums = damage.compare(
        layers.Head(torch.nn.Identity(), torch.eye(2)), parent, children, probe.next_ids, probe.weights
    )
    found = damage.finish(sums[0])
    assert (found["top1"], found["cosine"], found["hidden_mse"]) == pytest.approx((share, share, share * 25 / 9))


def test_chunks_of_tokens_change_no_metric(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    head = layers.Head(torch.nn.Identity(), torch.randn(10, 4, generator=generator))
    parent, children = torch.randn(23, 4, generator=generator), torch.randn(3, 23, 4, generator=generator)
    next_ids = torch.randint(0, 10, (23,), generator=generator)
    weights = torch.rand(23, generator=generator, dtype=torch.float64)
    whole = damage.compare(head, parent, children, next_ids, weights)
    monkeypatch.setattr(damage, "COMPARED_LOGITS", 150)
    chunked = damage.compare(head, parent, children, next_ids, weights)
    assert_near(chunked, whole, 1e-6)  # 8 steps of float32, of the energy


def test_num_steps():
    """Three layers of 1, 2 and 4 variants: 1 * 3 + 2 * 2 + 4 * 1."""
    assert scoring.num_steps([1, 2, 4]) == 11


def test_gates(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    scoring.check_identity(0, {"hidden_mse": 1e-9})
    for broken in (1e-5, float("nan")):
        with pytest.raises(StageError, match="layer 2: the parent's own block"):
            scoring.check_identity(2, {"hidden_mse": broken})
    block = loading.load_block(tiny_checkpoint, 1)
    states = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    for top_k in (1, 2, 3):
        scoring.check_masking(1, block, states, (0, 3, 5), top_k)
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "mix_sliced", lambda *given: layers.mix_sliced(*given[:2], (0, 3, 6), given[3]))
        with pytest.raises(StageError, match="layer 1: masking all but 3 experts"):
            scoring.check_masking(1, block, states, (0, 3, 5), 2)
    monkeypatch.setattr(scoring, "mix_sliced", lambda *given: layers.mix_sliced(*given[:3], 2))
    with pytest.raises(StageError, match="layer 1: masking all but 3 experts"):
        scoring.check_masking(1, block, states, (0, 3, 5), 1)
