"""Simulated peaks against those of the same step on real tensors, on two ranks; AutoModel is imported once."""

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.family import ModelShape
from moesaic.models.families.gpt_oss import GPT_OSS
from moesaic.recover.distill.automodel.settings import Job
from moesaic.recover.distill.stage import DistillConfig
from tests.recover.forked_engine import import_engine
from tests.recover.two_ranks import run_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SHAPE = ModelShape(
    family=GPT_OSS,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=512,
    max_positions=512,
)
PARENT = Architecture.of([Block(8, 2, 96, 24), Block(8, 2, 96, None)])
CHILD = Architecture.of([Block(4, 2, 96, 24), Block(6, 2, 96, 64)])
CONFIG = DistillConfig(
    sequence_tokens=256, rows_per_step=2, expert_chunk_tokens=64, logits_chunk_tokens=64, hidden_tokens=96
)
PLACE = Path("/nowhere")


def job(num_gpus: int, sharing: int) -> Job:
    return Job(PLACE, PLACE, PLACE, PLACE, num_gpus, True, None, expert_parallel_size=sharing)


def test_simulated_peaks_are_those_of_real_tensors(tmp_path: Path) -> None:
    """Sizes are the same; how many tokens each rank's experts get is only so on average."""
    import_engine()
    assert run_two_ranks(run_rank, tmp_path) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["measured"] == pytest.approx(found["simulated"], rel=0.1)
    assert found["whole"] == pytest.approx(found["simulated"], rel=0.01), "chunks behind the first change no peak"
    parts = found["parts"]
    child, parent = (layout.num_parameters(SHAPE, model) for model in (CHILD, PARENT))
    names = layout.trainable_names(SHAPE, CHILD, CONFIG.trainable)
    specs = layout.tensor_specs(SHAPE, CHILD, packed=False)
    trained = sum(specs[name].num_parameters for name in names)
    assert parts["weights"] == pytest.approx((2 * (parent + child) + 2 * trained) / 2, rel=0.02)
    assert parts["optimizer"] == pytest.approx(8 * trained / 2, rel=0.02)


def run_rank(rank: int, scratch: Path) -> None:
    import torch
    import torch.distributed as dist

    from moesaic.recover.distill.automodel import simulation

    torch.compiler.set_stance("force_eager")
    dist.init_process_group("gloo", init_method=f"file://{scratch / 'group'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    step = simulation.Step(CONFIG, SHAPE, PARENT, CHILD, job(2, 2))
    step.materialize()
    for model in (step.teacher_model, *step.model_parts):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.detach().to_local(), std=0.02)  # type: ignore[attr-defined]
    measured = step.peak(row(torch)).total
    dist.destroy_process_group()
    if rank == 0:
        peak = simulation.simulate(CONFIG, SHAPE, PARENT, CHILD, job(2, 2), fused=False)
        whole = simulation.simulate(CONFIG, SHAPE, PARENT, CHILD, job(2, 2), fused=False, all_chunks=True)
        found = {"measured": measured, "simulated": peak.total, "whole": whole.total, "parts": peak.parts}
        (scratch / "found.json").write_text(json.dumps(found))


def row(torch: Any) -> dict[str, Any]:
    from moesaic.recover.distill.automodel import simulation

    batch = simulation.full_batch(CONFIG)
    ids = torch.randint(0, SHAPE.vocab_size, batch["input_ids"].shape)
    return batch | {"input_ids": ids, "position_ids": torch.arange(CONFIG.sequence_tokens).unsqueeze(0)}
