"""Reading traces, packing them, and the proof that packed traces do not see each other."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import ArtifactError
from moesaic.models.gpt_oss_puzzle import load_model
from moesaic.recover.generate_traces.traces import (
    IGNORED,
    PackedRow,
    Trace,
    make_batch,
    pack_traces,
    read_traces,
    rows_of_step,
)
from tests.closeness import assert_near

EXAMPLE = Trace("a", "add", "low", (1, 2, 3), (4, 5), True, False, False)


def trace_of(num_positions: int, name: str = "x") -> Trace:
    """A trace that takes so many places."""
    return Trace(name, "add", "low", (1,), tuple(range(2, 2 + num_positions)), True, False, False)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_a_trace_survives_its_line(tmp_path: Path) -> None:
    other = Trace("b", "hops", "high", (1,), (2,), False, True, True)
    path = write(tmp_path / "traces.jsonl", EXAMPLE.to_json(), other.to_json())
    assert read_traces(path) == read_traces(tmp_path) == [EXAMPLE, other]
    assert json.loads(EXAMPLE.to_json()) == {
        "id": "a",
        "task": "add",
        "effort": "low",
        "prompt_ids": [1, 2, 3],
        "reply_ids": [4, 5],
        "correct": True,
        "truncated": False,
        "held_out": False,
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("id", 3, "'id' must be text, found 3"),
        ("effort", "extreme", "'effort' must be one of low, medium, high, found 'extreme'"),
        ("prompt_ids", [], "'prompt_ids' must be a list of token ids"),
        ("reply_ids", [1, -1], "'reply_ids' must be a list of token ids"),
        ("reply_ids", [1, True], "'reply_ids' must be a list of token ids"),
        ("correct", 1, "'correct' must be true or false, found 1"),
        ("truncated", None, "'truncated' must be true or false, found None"),
        ("held_out", True, "the prompt 'a' says otherwise"),
    ],
)
def test_the_line_that_is_not_a_trace_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    good = json.loads(EXAMPLE.to_json())
    path = write(tmp_path / "traces.jsonl", good, good | {key: value})
    with pytest.raises(ArtifactError, match="traces.jsonl, line 2.*" + message):
        read_traces(path)


def test_packing_by_hand() -> None:
    """9 fits no row; 6 opens row 0, 5 row 1, 4 row 2; 3 goes to row 1, the fullest with room for it, and 2 to row 0."""
    traces = [trace_of(length) for length in (2, 5, 9, 3, 6, 4)]
    rows = pack_traces(traces, sequence_tokens=8, seed=0)
    assert [[trace.num_positions for trace in row.traces] for row in rows] == [[6, 2], [5, 3], [4]]
    assert len(traces) - sum(len(row.traces) for row in rows) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 5))
def test_packing_loses_nothing_and_repeats_itself(lengths: list[int], seed: int) -> None:
    traces = [trace_of(length, str(place)) for place, length in enumerate([*lengths, 1])]
    rows = pack_traces(traces, 16, seed)
    assert rows == pack_traces(traces, 16, seed)
    packed = Counter(trace.id for row in rows for trace in row.traces)
    assert packed == Counter(trace.id for trace in traces if trace.num_positions <= 16)
    assert all(row.num_positions <= 16 for row in rows)
    assert sum(row.num_positions <= 8 for row in rows) <= 1  # two half-empty rows would be one


def test_the_seed_mixes_traces_of_equal_length() -> None:
    traces = [trace_of(4, str(place)) for place in range(20)]
    first, second = ([trace.id for row in pack_traces(traces, 8, seed) for trace in row.traces] for seed in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_rows_too_short_for_any_trace_are_refused() -> None:
    assert pack_traces([], 4, 0) == []
    with pytest.raises(ArtifactError, match="none of the 2 traces fits a row of 4 tokens, the shortest takes 5"):
        pack_traces([trace_of(5), trace_of(7)], 4, 0)


def test_a_batch_by_hand() -> None:
    """Prompt 1 2 3 with reply 4 5, then prompt 6 with reply 7 8; the second row is padded to the first."""
    other = Trace("b", "add", "low", (6,), (7, 8), True, False, False)
    batch = make_batch([PackedRow((EXAMPLE, other)), PackedRow((other,))], 6)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 7], [6, 7, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]]
    none = IGNORED
    assert batch.labels.tolist() == [[none, none, 4, 5, 7, 8], [7, 8, none, none, none, none]]
    assert_near(batch.reply_share.sum(-1), torch.tensor([2.0, 1.0]), 1e-6)
    assert torch.equal(batch.reply_share > 0, batch.labels != IGNORED)
    assert batch.responses.tolist() == [2, 3, 4, 5, 6, 7]


def test_packed_traces_do_not_see_each_other(tiny_parent: Path) -> None:
    """Hidden states and logits of a packed row are those of its traces alone; window layers and full ones."""
    model = load_model(tiny_parent, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def draw(prompt: int, reply: int) -> Trace:
        ids = [tuple(torch.randint(20, 64, (length,), generator=generator).tolist()) for length in (prompt, reply)]
        return Trace("x", "add", "low", ids[0], ids[1], True, False, False)

    row = PackedRow((draw(20, 15), draw(3, 9), draw(12, 13)))
    batch = make_batch([row, PackedRow((draw(4, 80),))], 90)
    with torch.no_grad():
        together = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, output_hidden_states=True, use_cache=False
        )
        start = 0
        for trace in row.traces:
            alone = model(torch.tensor([trace.token_ids[:-1]]), output_hidden_states=True, use_cache=False)
            stop = start + trace.num_positions
            assert_near(together.logits[:1, start:stop], alone.logits)
            for packed, single in zip(together.hidden_states, alone.hidden_states, strict=True):
                assert_near(packed[:1, start:stop], single)
            start = stop


def test_every_epoch_visits_every_row_once() -> None:
    visited = [row for step in range(7) for row in rows_of_step(7, 3, step, seed=1)]
    for epoch in range(3):
        assert sorted(visited[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert visited[:7] != visited[7:14]


def test_a_step_has_its_rows_whatever_ran_before() -> None:
    whole = [rows_of_step(5, 2, step, seed=3) for step in range(8)]
    assert rows_of_step(5, 2, 6, seed=3) == whole[6]
    assert whole != [rows_of_step(5, 2, step, seed=4) for step in range(8)]
    assert whole[0] + whole[1] + whole[2][:1] == [row for place in range(5) for row in rows_of_step(5, 1, place, 3)]
