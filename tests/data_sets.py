"""The smallest data sets that a run can start from: a row or two of each kind."""

import json
from pathlib import Path

from moesaic.data.sets import FILES
from moesaic.platform.store import Store

QUESTION = {"role": "user", "content": "w1"}
CONVERSATION = {"messages": [QUESTION, {"role": "assistant", "content": "w2"}]}
PROBLEM = {"task": "t", "prompt": [QUESTION], "answer": "w2", "verifier": "exact_match"}


def write_sets(directory: Path, num_rows: int = 1) -> Path:
    """Every set under its usual name."""
    directory.mkdir(exist_ok=True)
    for name, file in FILES.items():
        row = CONVERSATION if name.startswith("calibration") else PROBLEM
        rows = [json.dumps(row | {"id": str(number)}) + "\n" for number in range(num_rows)]
        (directory / file).write_text("".join(rows))
    return directory


def add_sets(store: Store, directory: Path, num_rows: int = 1) -> dict[str, str]:
    """Every set in a store: the ids of their manifests by the name of the set."""
    write_sets(directory, num_rows)
    return {
        name: store.add_file(directory / file, "dataset", format="jsonl", producer="test").id
        for name, file in FILES.items()
    }
