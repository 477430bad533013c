"""Write a training checkpoint as gpt-oss is stored: `python -m examples.reasoner.export --run DIR --out DIR`."""

from pathlib import Path

from examples.reasoner.tasks import SUITE
from examples.tiny_reasoner import export

if __name__ == "__main__":
    export.main(SUITE.config(), Path(__file__).parent / "parent")
