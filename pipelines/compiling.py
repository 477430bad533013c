"""Compile every pipeline into the package, where an installed wheel finds it; the same source gives the same bytes."""

import sys
from itertools import product
from pathlib import Path

from kfp import compiler

from moesaic.pipelines import COMPILED, pipeline_name
from pipelines import compress, search


def compile_all(directory: Path = COMPILED) -> list[Path]:
    """Write ``<name>-<version>.yaml`` for each."""
    named = {
        f"{pipeline_name(rounds, control)}-{compress.VERSION}": compress.compress(rounds, control)
        for rounds, control in product(compress.ROUNDS, (True, False))
    }
    named[f"search-{search.VERSION}"] = search.search
    directory.mkdir(exist_ok=True)
    paths = []
    for name, pipeline in named.items():
        paths.append(directory / f"{name}.yaml")
        compiler.Compiler().compile(pipeline, str(paths[-1]))
    return paths


if __name__ == "__main__":
    print(*compile_all(), sep="\n", file=sys.stderr)
