"""A child's blocks in its config: one meaning in every spelling, for every reader."""

import json
from typing import Any

import pytest
from transformers import GptOssConfig

from moesaic.models import gpt_oss
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.gpt_oss_puzzle.configuration_gpt_oss_puzzle import GptOssPuzzleConfig

BLOCKS = Architecture.of([Block(4, 8), Block(8), Block(2, 8), Block(6, 5)])


@pytest.fixture
def written(tiny_checkpoint: Checkpoint) -> dict[str, Any]:
    """As it stands in ``config.json``."""
    config: dict[str, Any] = json.loads(json.dumps(gpt_oss.child_config(tiny_checkpoint.config, BLOCKS)))
    return config


def blocks_of(config: GptOssPuzzleConfig) -> list[tuple[int | None, int | None]]:
    """By attributes, as an engine with a class of its own reads them."""
    return [(block.num_local_experts, block.sliding_window) for block in config.block_configs or []]


def test_both_spellings_and_either_one_give_the_same_blocks(written: dict[str, Any]) -> None:
    expected = [(block.num_experts, block.window) for block in BLOCKS.blocks]
    assert blocks_of(GptOssPuzzleConfig.from_dict(dict(written))) == expected
    for spelling in ("block_configs", "per_layer_config"):
        alone = {key: value for key, value in written.items() if key != spelling}
        assert blocks_of(GptOssPuzzleConfig.from_dict(alone)) == expected
    assert [entry["sliding_window"] for entry in written["block_configs"]] == [8, None, 8, 5]


def test_transformers_own_config_reads_the_same_layers(written: dict[str, Any]) -> None:
    """Its gpt-oss does not build layers of it yet; what it would build them from is there."""
    native = {key: value for key, value in written.items() if key not in ("block_configs", "auto_map", "architectures")}
    config = GptOssConfig.from_dict(native | {"model_type": "gpt_oss"})
    read = [config.per_layer_config[layer] for layer in range(BLOCKS.num_layers)]
    assert [(layer.num_local_experts, layer.sliding_window) for layer in read] == [(4, 8), (8, None), (2, 8), (6, 5)]


def test_spellings_that_differ_are_refused(written: dict[str, Any]) -> None:
    written["per_layer_config"]["2"]["num_local_experts"] = 3
    with pytest.raises(ValueError, match="block_configs and per_layer_config say different things"):
        GptOssPuzzleConfig.from_dict(written)


def test_a_value_that_a_block_has_not_is_no_attribute(written: dict[str, Any]) -> None:
    (block, *_) = GptOssPuzzleConfig.from_dict(written).block_configs or []
    with pytest.raises(AttributeError, match="width"):
        _ = block.width
