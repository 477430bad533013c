"""Blocks and architectures are plain values that refuse nonsense."""

import pytest

from moesaic.core.errors import ConfigError
from moesaic.models.architecture import Architecture, Block

PARENT = Architecture.of([Block(8, 2, 64, 32), Block(8, 2, 64)])


def test_json_round_trip_is_the_released_format() -> None:
    assert PARENT.to_json() == (
        '[{"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 32}, '
        '{"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": null}]'
    )
    assert Architecture.from_json(PARENT.to_json()) == PARENT


@pytest.mark.parametrize("window", [1, 0, -8])
def test_a_window_below_two_tokens_is_refused(window: int) -> None:
    with pytest.raises(ConfigError, match=f"got window={window}; None means full"):
        Block(8, 2, 64, window)


def test_a_block_without_experts_has_nothing_of_theirs() -> None:
    assert Block(0, 0, 0, 32).label == "dense/32"
    with pytest.raises(ConfigError, match="num_experts=0 is dense, so expert_width=64 means nothing"):
        Block(0, 0, 64)
    with pytest.raises(ConfigError, match="0 experts cannot use 1 of them"):
        Block(0, 1, 0)


def test_a_token_cannot_use_more_experts_than_there_are() -> None:
    with pytest.raises(ConfigError, match="2 experts cannot use 3 of them"):
        Block(2, 3, 64)


@pytest.mark.parametrize("block", [Block(9, 2, 64, 32), Block(8, 3, 64, 32), Block(8, 2, 64, 64), Block(8, 2, 64)])
def test_a_child_cannot_have_more_than_its_parent(block: Block) -> None:
    with pytest.raises(ConfigError, match="layer 0"):
        PARENT.replace(0, block).check_child_of(PARENT)


def test_less_on_any_axis_is_a_child() -> None:
    PARENT.replace(0, Block(2, 1, 64, 16)).replace(1, Block(8, 1, 64, 4)).check_child_of(PARENT)
    PARENT.check_child_of(PARENT)
