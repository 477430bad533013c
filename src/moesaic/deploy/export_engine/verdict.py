"""What may be said of a bundle: what was checked, which engine has loaded it, and what that engine found."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

VERDICT = "verdict.json"
"""Where ``validate_bundle`` writes it."""
_CHECKED = "files and layout checked"


@dataclass(frozen=True)
class Verdict:
    """What is known of an exported bundle."""

    passed: bool
    """Whether it passed every check that was made."""
    loaded_by: str | None = None
    """The engine that was given it: name, version and device; None if none was, so that the bundle is unverified."""
    why_unverified: str = "no engine has loaded it"
    """Why there is no engine's word."""
    problems: tuple[str, ...] = ()
    """What the engine refused, or does otherwise than the reference."""
    replies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By effort, how its replies compare with the reference."""

    def to_json(self) -> str:
        """The content of its file."""
        return json.dumps({"verdict": self.words, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Verdict":
        """A verdict out of its file, or out of what the export recorded; what is not said is not known."""
        return cls(
            passed=content.get("passed") is True,
            loaded_by=content.get("loaded_by"),
            why_unverified=content.get("why_unverified", cls.why_unverified),
            problems=tuple(content.get("problems", ())),
            replies=content.get("replies", {}),
        )

    @property
    def words(self) -> str:
        """The verdict in one line."""
        if self.loaded_by is None:
            checked = f"{_CHECKED}; {self.why_unverified}" if self.passed else "a check of files and layout failed"
            return f"unverified: {checked}"
        if not self.passed:
            return f"wrong by {self.loaded_by}: {self.problems[0]}"
        compared = sum(one["replies"] for one in self.replies.values())
        agreeing = sum(one["agreeing"] for one in self.replies.values())
        agrees = f", {agreeing} of {compared} replies are the reference's but for near ties" if compared else ""
        return f"verified by {self.loaded_by}{agrees}"
