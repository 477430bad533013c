"""NeMo-RL's Python is newer than Debian's: below 3.12 pydantic reads the TypedDict of this package only."""

import typing

import typing_extensions

typing.TypedDict = typing_extensions.TypedDict
