"""The table of traces, packing, and the proof that packed traces do not see each other."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import ArtifactError
from moesaic.models.whole_model import load_model
from moesaic.recover.distill.packing import IGNORED, make_batch, pack, rows_of_step
from moesaic.recover.distill.trace_table import TraceTable
from moesaic.recover.generate_traces.traces import Trace
from tests.closeness import assert_near

EXAMPLE = Trace("a", "add", "low", (1, 2, 3), (4, 5), True, False, False)
OTHER = Trace("b", "add", "high", (6,), (7, 8), True, False, True)


def test_a_table_gives_back_what_was_written(tmp_path: Path) -> None:
    TraceTable.write(iter([OTHER]), tmp_path)
    table = TraceTable.write(iter([EXAMPLE, OTHER]), tmp_path)
    found = [(ids.tolist(), num_prompt) for ids, num_prompt in map(table.tokens, range(2))]
    assert found == [([1, 2, 3, 4, 5], 3), ([6, 7, 8], 1)]
    assert table.num_places(table.chosen(("low", "high"), held_out=False)).tolist() == [4]
    assert table.chosen(("low", "high"), held_out=True).tolist() == [1]
    assert table.chosen(("low",), held_out=True).tolist() == []
    assert table.largest_token() == 8
    assert (tmp_path / "tokens.u32").stat().st_size == 4 * 8


def test_packing_by_hand() -> None:
    """9 fits no row; 6 opens row 0, 5 row 1, 4 row 2; 3 goes to row 1, the fullest with room for it, and 2 to row 0."""
    places = [2, 5, 9, 3, 6, 4]
    rows = pack(places, sequence_tokens=8, seed=0)
    assert [[places[trace] for trace in row] for row in rows] == [[6, 2], [5, 3], [4]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 5))
def test_packing_loses_nothing_and_repeats_itself(lengths: list[int], seed: int) -> None:
    places = [*lengths, 1]
    rows = pack(places, 16, seed)
    assert rows == pack(places, 16, seed)
    assert Counter(trace for row in rows for trace in row) == Counter(
        trace for trace, length in enumerate(places) if length <= 16
    )
    sizes = [sum(places[trace] for trace in row) for row in rows]
    assert max(sizes) <= 16
    assert sum(size <= 8 for size in sizes) <= 1  # two half-empty rows would be one


def test_the_seed_mixes_traces_of_equal_length() -> None:
    first, second = ([trace for row in pack([4] * 20, 8, seed) for trace in row] for seed in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_rows_too_short_for_any_trace_are_refused() -> None:
    assert pack([], 4, 0) == []
    with pytest.raises(ArtifactError, match="none of the 2 traces fits a row of 4 tokens, the shortest takes 5"):
        pack([5, 7], 4, 0)


def test_a_batch_by_hand(tmp_path: Path) -> None:
    """Prompt 1 2 3 with reply 4 5, then prompt 6 with reply 7 8; the second row is padded."""
    table = TraceTable.write([EXAMPLE, OTHER], tmp_path)
    batch = make_batch(table, [[0, 1], [1]], 6)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 7], [6, 7, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]]
    none = IGNORED
    assert batch.labels.tolist() == [[none, none, 4, 5, 7, 8], [7, 8, none, none, none, none]]
    assert_near(batch.reply_share.sum(-1), torch.tensor([2.0, 1.0]), 1e-6)
    assert torch.equal(batch.reply_share > 0, batch.labels != IGNORED)
    assert batch.responses.tolist() == [2, 3, 4, 5, 6, 7]


def test_where_a_row_is_one_context_positions_run_on(tmp_path: Path) -> None:
    table = TraceTable.write([EXAMPLE, OTHER], tmp_path)
    apart, together = (make_batch(table, [[0, 1]], 7, context) for context in ("trace", "row"))
    assert together.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    for name in ("input_ids", "labels", "reply_share"):
        assert torch.equal(getattr(together, name), getattr(apart, name))


def test_packed_traces_do_not_see_each_other(tiny_parent: Path, tmp_path: Path) -> None:
    """Hidden states and logits of a packed row are those of its traces alone; window layers and full ones."""
    model = load_model(tiny_parent, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def draw(prompt: int, reply: int) -> Trace:
        ids = [tuple(torch.randint(20, 64, (length,), generator=generator).tolist()) for length in (prompt, reply)]
        return Trace("x", "add", "low", ids[0], ids[1], True, False, False)

    traces = [draw(20, 15), draw(3, 9), draw(12, 13), draw(4, 80)]
    batch = make_batch(TraceTable.write(traces, tmp_path), [[0, 1, 2], [3]], 90)
    with torch.no_grad():
        together = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, output_hidden_states=True, use_cache=False
        )
        start = 0
        for trace in traces[:3]:
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
