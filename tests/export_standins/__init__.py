"""Stand-ins of the engines' interfaces: as much of them as a gpt-oss model touches, without kernels.

They behave as the engines' own gpt-oss does where it matters: one number of experts for all layers, a window on every
even layer, a loader that reads the number of experts from the config. They hold no weights, only shapes, and record
what each layer was built with and what was loaded into it. Names that the engine does not have they do not have either.
"""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def install(modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Let these modules be imported, with these names inside; packages above them come into being."""
    for path, names in modules.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            module = sys.modules.setdefault(package, ModuleType(package))
            module.__path__ = []
        for name, value in names.items():
            setattr(sys.modules[path], name, value)
