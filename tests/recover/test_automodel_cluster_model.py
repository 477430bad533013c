"""The cluster's model class against transformers', on random children of uneven layers; AutoModel is imported once."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.user_name import user_variables
from moesaic.models import layout, whole_model
from moesaic.models.architecture import Architecture, Block
from moesaic.models.attention import document_starts, sink_attention
from moesaic.models.checkpoint import Checkpoint, layer_shards, rewrite_checkpoint, write_checkpoint
from moesaic.recover.distill.automodel.cluster_attention import TILE, first_keys, flex_sink_attention, tile_mask
from moesaic.recover.distill.automodel.expert_parallel import check_expert_parallel
from tests.children import first_of
from tests.closeness import assert_experts_decided, assert_near
from tests.layer_states import layer_state
from tests.other_user import as_user, needs_root
from tests.recover.forked_engine import import_engine
from tests.recover.two_ranks import run_two_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

CHILD = Architecture.of([Block(8, 2, 64, 24), Block(6, 1, 32, None), Block(4, 2, 64, 5), Block(2, 1, 64, 100)])
UNEVEN = Architecture.of([Block(8, 2, 64, 24), Block(5, 1, 64, None), Block(4, 2, 64, 5), Block(3, 2, 64, 100)])
LONG, SHORT = [100, 37, 1, 62], [9]
"""Lengths of the documents packed into one row."""
_DECIDED_SEED = 2
"""Of the tokens of all rows; none of them chooses its experts at a near tie."""
GROUPS = ("attention", "norms", "router", "embedding", "head")


@pytest.fixture(scope="module")
def cluster_model() -> Iterable[ModuleType]:
    from moesaic.recover.distill.automodel import cluster_model

    torch.compiler.set_stance("force_eager")  # AutoModel compiles the experts' activation; nothing to test there
    yield cluster_model
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module", params=["packed", "unpacked"])
def child(request: pytest.FixtureRequest, tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer another expert count and another window; the config asks for an auxiliary loss, as gpt-oss's does."""
    directory: Path = tmp_path_factory.mktemp("models") / request.param
    write_child(Checkpoint.open(tiny_parent), directory, request.param == "packed")
    return directory


@pytest.fixture(scope="module")
def model(child: Path, cluster_model: ModuleType) -> Any:
    """The child in the cluster's class, not to be changed."""
    return load_cluster_model(cluster_model, child).eval()


def load_cluster_model(cluster_model: ModuleType, directory: Path) -> Any:
    """A whole child or parent on one device, by the steps that AutoModel's recipes take on many."""
    from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig

    config = cluster_model.read_config(directory)
    config.dtype = torch.float32
    model = cluster_model.GptOssPuzzleForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    settings = CheckpointingConfig(checkpoint_dir=directory, model_repo_id=str(directory), save_consolidated=False)
    Checkpointer(settings, 0, 0, 0, None).load_model(model, str(directory), is_init_step=True)
    limit_experts(model, 64)  # rows take several chunks, the last one shorter
    return model


def limit_experts(model: Any, chunk_tokens: int) -> None:
    from moesaic.recover.distill.automodel import cluster_experts

    cluster_experts.limit_experts(model, chunk_tokens)
    assert {module.chunk_tokens for module in model.modules() if hasattr(module, "chunk_tokens")} == {chunk_tokens}


def write_child(parent: Checkpoint, directory: Path, packed: bool, architecture: Architecture = CHILD) -> None:
    def shards() -> Iterable[tuple[str, dict[str, Tensor]]]:
        yield "model-outer", {name: parent.tensor(name) for name in layout.outer_specs(parent.shape)}
        for layer, block in enumerate(architecture.blocks):
            tensors = {name: parent.tensor(name) for name in parent.layer_names(layer)}
            if not packed:
                prefix = layout.layer_prefix(layer)
                tensors = {prefix + name: value for name, value in layer_state(parent, layer, torch.bfloat16).items()}
            yield from layer_shards(layer, first_of(tensors, block))

    config = {**layout.child_config(parent.config, architecture), "router_aux_loss_coef": 0.9}
    if not packed:
        del config["quantization_config"]
    write_checkpoint(directory, config, shards())


def packed_row(documents: list[int]) -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(length) for length in documents]).unsqueeze(0)
    tokens = torch.randint(0, 64, positions.shape, generator=torch.Generator().manual_seed(_DECIDED_SEED))
    return {"input_ids": tokens, "position_ids": positions}


def assert_same_gradient(name: str, ours: Tensor, expected: Tensor) -> None:
    """Of tensor ``name``, summed by two different ways through the model."""
    # What float32 leaves of sums over all tokens and layers; a router's biases get differences of almost equal sums.
    assert_near(ours, expected, 1e-3 if name.endswith("gate.bias") else 1e-4, name)


def test_experts_are_decided_in_all_rows(child: Path, tiny_parent: Path, tmp_path: Path) -> None:
    write_child(Checkpoint.open(tiny_parent), tmp_path / "uneven", True, UNEVEN)
    compared = {
        child: (LONG, SHORT, [200], [30, 20], [100, 50], [150]),
        tmp_path / "uneven": ([100, 50], [150]),
        tiny_parent: (LONG,),
    }
    for directory, rows in compared.items():
        model = whole_model.load_model(directory)
        for documents in rows:
            assert_experts_decided(model, packed_row(documents))


@pytest.mark.parametrize("documents", [LONG, SHORT])
def test_logits_and_hidden_states_are_those_of_transformers(child: Path, model: Any, documents: list[int]) -> None:
    row = packed_row(documents)
    with torch.no_grad():
        ours = model(**row, output_hidden_states=True)
        expected = whole_model.load_model(child)(**row, output_hidden_states=True, use_cache=False)
    assert_near(ours.logits, expected.logits)
    for hidden, other in zip(ours.hidden_states, expected.hidden_states, strict=True):
        assert_near(hidden, other)


def test_windows_and_sinks_are_those_of_transformers_own_attention(child: Path, model: Any) -> None:
    row = packed_row([200])
    reference = whole_model.load_model(child)
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        assert_near(model(**row).logits, reference(**row, use_cache=False).logits)


def test_documents_of_a_row_do_not_see_each_other(model: Any) -> None:
    row = packed_row([30, 20])
    with torch.no_grad():
        together = model(**row).logits
        alone = model(row["input_ids"][:, 30:]).logits
    assert_near(together[:, 30:], alone)


def test_gradients_are_those_of_transformers_without_any_balancing_of_experts(
    child: Path, cluster_model: ModuleType
) -> None:
    from moesaic.recover.distill.automodel.cluster_weights import checkpoint_name

    row = packed_row(LONG)
    model, reference = load_cluster_model(cluster_model, child).train(), whole_model.load_model(child).train()
    expected = dict(reference.named_parameters())
    for each in (model, reference):
        torch.nn.functional.cross_entropy(each(**row).logits[0, :-1], row["input_ids"][0, 1:]).backward()
    for name, parameter in model.named_parameters():
        if not layout.is_expert_weight(name):
            assert_same_gradient(name, parameter.grad, expected[checkpoint_name(model, name)].grad)
    assert [name for name, _ in model.named_buffers()] == []  # such as a bias that the gate would update


def test_the_whole_state_goes_to_checkpoint_names_and_back_unchanged(child: Path, model: Any) -> None:
    checkpoint = Checkpoint.open(child)
    native = {name: value.clone() for name, value in model.state_dict().items()}
    ours = model.state_dict_adapter.to_hf(dict(native))
    expected = {name: checkpoint.tensor(name).float() for name in layout.outer_specs(checkpoint.shape)}
    for layer in range(checkpoint.num_layers):
        prefix = layout.layer_prefix(layer)
        expected |= {prefix + name: value for name, value in layer_state(checkpoint, layer).items()}
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, check_dtype=False)
    experts = {value.dtype for name, value in native.items() if ".experts." in name}
    assert experts == {torch.bfloat16} and native["lm_head.weight"].dtype == torch.float32
    torch.testing.assert_close(model.state_dict_adapter.from_hf(ours), native, rtol=0, atol=0)


def test_a_written_child_differs_in_nothing_but_what_was_trained(
    child: Path, cluster_model: ModuleType, tmp_path: Path
) -> None:
    from moesaic.recover.distill.automodel.cluster_weights import checkpoint_tensors

    model = load_cluster_model(cluster_model, child)
    source = Checkpoint.open(child)
    changed = "model.layers.2.self_attn.sinks"
    with torch.no_grad():
        model.model.layers["2"].self_attn.sinks += 1
    names = layout.trainable_names(source.shape, source.architecture, GROUPS)
    rewrite_checkpoint(source, tmp_path / "out", dict(checkpoint_tensors(model, names)), {"stage": "distill"})
    written = Checkpoint.open(tmp_path / "out")
    assert [name for name in source.files if not torch.equal(written.tensor(name), source.tensor(name))] == [changed]
    torch.testing.assert_close(written.tensor(changed), (source.tensor(changed).float() + 1).bfloat16())
    with pytest.raises(ArtifactError, match=r"no tensor model\.layers\.9\.self_attn\.sinks"):
        next(checkpoint_tensors(model, ["model.layers.9.self_attn.sinks"]))


def test_automodel_finds_the_class_by_the_architecture_in_the_config(child: Path, cluster_model: ModuleType) -> None:
    from nemo_automodel._transformers.registry import ModelRegistry
    from transformers import AutoConfig

    cluster_model.register()
    config = AutoConfig.from_pretrained(child)
    found = ModelRegistry.resolve_custom_model_cls(config.architectures[0], config)
    assert found is cluster_model.GptOssPuzzleForCausalLM
    assert found.ModelCapabilities.supports_ep
    assert found.from_config(config).model.moe_config.n_routed_experts == 2  # of 8, 6, 4 and 2


def test_a_parent_is_a_child_whose_blocks_are_all_its_own(tiny_parent: Path, cluster_model: ModuleType) -> None:
    from nemo_automodel._transformers.registry import ModelRegistry
    from transformers import AutoConfig

    row = packed_row(LONG)
    with torch.no_grad():
        ours = load_cluster_model(cluster_model, tiny_parent).eval()(**row).logits
        assert_near(ours, whole_model.load_model(tiny_parent)(**row, use_cache=False).logits)
    cluster_model.register()
    config = AutoConfig.from_pretrained(tiny_parent)
    found = ModelRegistry.resolve_custom_model_cls(config.architectures[0], config)
    assert found.from_config(config).config.windows == [8, None, 8, None]


def test_attention_that_cannot_do_all_of_it_is_refused(child: Path, cluster_model: ModuleType) -> None:
    from nemo_automodel.components.models.common import BackendConfig

    config = cluster_model.read_config(child)
    with pytest.raises(ConfigError, match=r"set backend\.attn to 'flex'"):
        cluster_model.GptOssPuzzleForCausalLM(config, backend=BackendConfig(attn="sdpa"))


def test_experts_must_divide_evenly_among_ranks() -> None:
    architecture = Architecture.of([Block(16, 2, 64, None), Block(12, 2, 64, None), Block(4, 2, 64, None)])
    for fitting in (1, 2, 4):
        check_expert_parallel(architecture, fitting)
    with pytest.raises(ConfigError, match=r"layer 1 has 12 experts.* 8 .*use an expert-parallel size of 1, 2, 4, or"):
        check_expert_parallel(architecture, 8)
    with pytest.raises(ConfigError, match="0 ranks"):
        check_expert_parallel(architecture, 0)


@pytest.mark.parametrize("window", [None, 1, 5, TILE, 200])
@pytest.mark.parametrize("documents", [[300], [40, 213, 47], [TILE, 2 * TILE]])
def test_tiles_are_seen_in_full_in_part_or_not_at_all(window: int | None, documents: list[int]) -> None:
    starts = document_starts(packed_row(documents)["position_ids"])
    size = sum(documents)
    mask = tile_mask(first_keys(size, window, starts, torch.device("cpu")))
    sees = visible(window, documents)
    zero = torch.tensor(0)
    token = torch.arange(size)
    assert torch.equal(mask.mask_mod(zero, zero, token.unsqueeze(1), token), sees)
    tiles = -(-size // TILE)
    for row in range(tiles):
        partial = set(mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist())
        full = set(mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist())
        pieces = sees[row * TILE : (row + 1) * TILE].split(TILE, dim=1)
        assert full == {column for column, piece in enumerate(pieces) if piece.all()}
        assert partial == {column for column, piece in enumerate(pieces) if piece.any() and not piece.all()}


def visible(window: int | None, documents: list[int]) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    token = torch.arange(len(document))
    distance = token.unsqueeze(1) - token
    return (distance >= 0) & (distance < (window or len(token))) & (document.unsqueeze(1) == document)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_with_sinks_equals_ours(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = packed_row(LONG)["position_ids"]
    query, key, value = (torch.randn(1, heads, 200, 16, generator=generator) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator)
    starts = document_starts(positions)
    mask = tile_mask(first_keys(200, window, starts, query.device))
    with torch.compiler.set_stance("force_eager"):
        ours = flex_sink_attention(query, key, value, sinks, 0.25, mask)
    assert_near(ours, sink_attention(query, key, value, sinks, 0.25, window, first_key=starts))


def test_two_ranks_train_one_model(tiny_parent: Path, tmp_path: Path) -> None:
    """Expert parallelism and FSDP2 on gloo: loading, logits, gradients and reading back, each against one process."""
    for name, architecture in (("even", CHILD), ("uneven", UNEVEN)):
        write_child(Checkpoint.open(tiny_parent), tmp_path / name, True, architecture)
    import_engine()
    assert run_two_ranks(run_rank, tmp_path) == 0
    assert (tmp_path / "done").read_text().splitlines() == [
        "even: 2 ranks share the experts",
        "uneven: 1 ranks share the experts",
    ]


def run_rank(rank: int, scratch: Path) -> None:
    import torch.distributed as dist

    torch.compiler.set_stance("force_eager")
    dist.init_process_group("gloo", init_method=f"file://{scratch / 'group'}", rank=rank, world_size=2)
    both = [packed_row([100, 50]), packed_row([150])]
    rows = {name: torch.cat([row[name] for row in both]) for name in both[0]}
    for child, ep_size in ((scratch / "even", 2), (scratch / "uneven", 1)):
        reference = whole_model.load_model(child)
        expected = reference(**rows, use_cache=False).logits
        expected.square().mean().backward()
        model = sharded_model(child, ep_size)
        limit_experts(model, 64)
        experts = {value.dtype for name, value in model.named_parameters() if layout.is_expert_weight(name)}
        assert experts == {torch.bfloat16}
        logits = model(**both[rank]).logits
        assert_near(logits[0], expected[rank])
        logits.square().mean().backward()
        compare_with(reference, model, child)
        if rank == 0:
            with (scratch / "done").open("a") as done:
                done.write(f"{child.name}: {ep_size} ranks share the experts\n")
    dist.destroy_process_group()


def sharded_model(child: Path, ep_size: int) -> Any:
    """As AutoModel's recipes make one: on no device, then sharded, then loaded; the experts frozen."""
    from nemo_automodel._transformers.infrastructure import apply_model_infrastructure, instantiate_infrastructure
    from nemo_automodel.components.distributed.config import DistributedSetup, FSDP2Config
    from nemo_automodel.components.distributed.mesh import ParallelismSizes
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from moesaic.recover.distill.automodel.cluster_model import GptOssPuzzleForCausalLM, read_config

    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    setup = DistributedSetup.build(FSDP2Config(mp_policy=policy), ParallelismSizes(ep_size=ep_size))
    wrapper, _, parallelize, _ = instantiate_infrastructure(
        distributed_config=setup.strategy_config,
        moe_parallel_config=setup.moe_parallel_config,
        activation_checkpointing=ep_size > 1,
        device=torch.device("cpu"),
        mesh=setup.mesh_context,
    )
    config = read_config(child)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = GptOssPuzzleForCausalLM(config)
    return apply_model_infrastructure(
        model,
        is_meta_device=True,
        device=torch.device("cpu"),
        mesh=setup.mesh_context,
        model_wrapper=wrapper,
        parallelize_fn=parallelize,
        pretrained_model_name_or_path=str(child),
        load_base_model=True,
        freeze_config={"freeze_modules": [{"glob": "*.mlp.experts"}]},
    )


def compare_with(reference: Any, model: Any, child: Path) -> None:
    """What both ranks trained together, gathered, is what one process trains on both rows."""
    from moesaic.recover.distill.automodel.cluster_weights import checkpoint_name, checkpoint_tensors

    source = Checkpoint.open(child)
    whole = dict(reference.named_parameters())
    names = layout.trainable_names(source.shape, source.architecture, GROUPS)
    for name, tensor in checkpoint_tensors(model, names):
        torch.testing.assert_close(tensor, whole[name].detach(), rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        if not layout.is_expert_weight(name):
            other = whole[checkpoint_name(model, name)]
            assert_same_gradient(name, parameter.grad.full_tensor(), other.grad)


@needs_root
def test_the_recipe_introduces_a_user_without_a_name(caplog: pytest.LogCaptureFixture) -> None:
    from nemo_automodel.recipes.base_recipe import BaseRecipe

    recipe = BaseRecipe()
    recipe.dist_env = SimpleNamespace(is_main=True, world_size=2)

    def introduce() -> list[str]:
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            os.environ.pop(name, None)
        with pytest.raises((KeyError, OSError)):
            recipe._log_experiment_details()
        os.environ.update(user_variables())
        with caplog.at_level(logging.INFO):
            recipe._log_experiment_details()
        return caplog.messages

    assert "User: moesaic" in as_user(54321, 0, introduce)
