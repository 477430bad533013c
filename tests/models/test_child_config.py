"""A child's blocks in its config: one meaning in every spelling, for every reader."""

import json
from dataclasses import replace
from typing import Any

import pytest
from transformers import GptOssConfig

from moesaic.models import layout
from moesaic.models.architecture import AXES, Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.gpt_oss_puzzle.configuration_gpt_oss_puzzle import BLOCK_KEYS, GptOssPuzzleConfig
from moesaic.models.resolved_config import resolve

BLOCKS = Architecture.of([Block(4, 2, 64, 8), Block(8, 1, 64), Block(2, 2, 32, 8), Block(6, 1, 64, 5)])


@pytest.fixture
def written(tiny_checkpoint: Checkpoint) -> dict[str, Any]:
    """As it stands in ``config.json``."""
    config: dict[str, Any] = json.loads(json.dumps(layout.child_config(tiny_checkpoint.config, BLOCKS)))
    return config


def blocks_of(config: GptOssPuzzleConfig) -> Architecture:
    """By attributes, as an engine with a class of its own reads them."""
    entries = [{axis.key: getattr(block, axis.key) for axis in AXES.values()} for block in config.block_configs or []]
    return Architecture.of(Block.from_config(entry) for entry in entries)


def test_the_class_that_travels_knows_every_axis() -> None:
    assert tuple(axis.key for axis in AXES.values()) == BLOCK_KEYS


def test_both_spellings_and_either_one_give_the_same_blocks(written: dict[str, Any]) -> None:
    assert blocks_of(GptOssPuzzleConfig.from_dict(dict(written))) == BLOCKS
    for spelling in ("block_configs", "per_layer_config"):
        alone = {key: value for key, value in written.items() if key != spelling}
        assert blocks_of(GptOssPuzzleConfig.from_dict(alone)) == BLOCKS
    assert [entry["sliding_window"] for entry in written["block_configs"]] == [8, None, 8, 5]


def test_transformers_own_config_reads_the_same_layers(written: dict[str, Any]) -> None:
    """Its gpt-oss does not build layers of it yet; what it would build them from is there."""
    native = {key: value for key, value in written.items() if key not in ("block_configs", "auto_map", "architectures")}
    config = GptOssConfig.from_dict(native | {"model_type": "gpt_oss"})
    read = [config.per_layer_config[layer] for layer in range(BLOCKS.num_layers)]
    values = [Block.of(getattr(layer, axis.key) for axis in AXES.values()) for layer in read]
    assert Architecture.of(values) == BLOCKS


@pytest.mark.parametrize("spelling", ["block_configs", "per_layer_config"])
def test_an_entry_without_experts_per_token_or_width_means_the_models_own(
    written: dict[str, Any], spelling: str
) -> None:
    """Children of before had no such entry; transformers reads ``per_layer_config`` so."""
    alone = {key: value for key, value in written.items() if key != spelling}
    kept = alone["per_layer_config" if spelling == "block_configs" else "block_configs"]
    for entry in kept.values() if isinstance(kept, dict) else kept:
        del entry["num_experts_per_tok"], entry["intermediate_size"]
    _, read = layout.read_config(resolve(alone))
    assert read == Architecture.of(replace(block, experts_per_token=2, expert_width=64) for block in BLOCKS.blocks)


def test_a_second_name_of_the_parents_value_is_not_passed_on(tiny_checkpoint: Checkpoint) -> None:
    """As in OpenAI's config, which says ``experts_per_token`` too: a child that uses fewer would contradict it."""
    parent = resolve(dict(tiny_checkpoint.config) | {"experts_per_token": 2})
    fewer = Architecture.of(replace(block, experts_per_token=1) for block in BLOCKS.blocks)
    assert layout.read_config(resolve(layout.child_config(parent, fewer)))[1] == fewer


def test_spellings_that_differ_are_refused(written: dict[str, Any]) -> None:
    written["per_layer_config"]["2"]["num_local_experts"] = 3
    with pytest.raises(ValueError, match="block_configs and per_layer_config say different things"):
        GptOssPuzzleConfig.from_dict(written)


def test_a_value_that_a_block_has_not_is_no_attribute(written: dict[str, Any]) -> None:
    (block, *_) = GptOssPuzzleConfig.from_dict(written).block_configs or []
    with pytest.raises(AttributeError, match="width"):
        _ = block.width
