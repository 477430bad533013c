"""Compile every pipeline into ``manifests/pipelines``; the same source gives the same bytes."""

import sys
from pathlib import Path

from kfp import compiler

from pipelines import MANIFESTS
from pipelines.search import VERSION, search


def compile_search(directory: Path = MANIFESTS) -> Path:
    """Write ``search-<version>.yaml``."""
    path = directory / f"search-{VERSION}.yaml"
    compiler.Compiler().compile(search, str(path))
    return path


if __name__ == "__main__":
    print(compile_search(), file=sys.stderr)
