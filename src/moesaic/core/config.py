"""What all configs share: frozen, checked, each default written once; and the words that several of them use.

A config says *what* is built. Where things lie (paths, stores, devices, servers) never enters one: the same config,
and so the same digest, runs on a laptop and on a cluster. Each stage's own config stands in its room.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moesaic.core.errors import ConfigError

Effort = Literal["low", "medium", "high"]
Precision = Literal["float32", "bfloat16"]
Balance = Literal["token", "trace"]
"""What counts alike in a mean: every token, or every trace (a sequence), so that short ones weigh as much as long."""
CacheDtype = Literal["bf16", "fp8"]
EmulatedCache = Literal["bf16", "fp8_unit", "fp8"]
ExportTarget = Literal["tensorrt_llm", "vllm"]
ServingEngine = Literal["moesaic", "tensorrt_llm", "vllm", "running"]
GeneratingEngine = Literal["in_process", "moesaic", "tensorrt_llm", "vllm", "running"]
Efforts = Annotated[tuple[Effort, ...], Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(gt=0)]
Window = Annotated[int, Field(ge=2)]


class Config(BaseModel):
    """What all configs share: they cannot change, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a config from JSON; a ConfigError lists every problem with its place, its value and what is allowed."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as invalid:
            raise ConfigError(f"{cls.__name__} is not valid:\n" + "\n".join(_explain(invalid))) from invalid

    def to_json(self) -> str:
        """Canonical JSON: every value, keys in order."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def but(self, **changes: Any) -> Self:
        """The same with other values, checked anew; a mapping changes a field that is itself a config, however deep.

        Raises:
            ValueError: for a field that there is not, or a value that is not allowed.
        """
        values = dict(self)
        for name, change in changes.items():
            before = values.get(name)
            values[name] = (
                before.but(**change) if isinstance(before, Config) and isinstance(change, Mapping) else change
            )
        return type(self)(**values)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _explain(invalid: ValidationError) -> list[str]:
    lines = []
    for problem in invalid.errors():
        place = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        lines.append(f"  {place} = {problem['input']!r:.200}: {problem['msg']}")
    return lines
