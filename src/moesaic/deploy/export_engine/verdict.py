"""What may be said of a bundle: what was checked, and which engine has loaded it."""

from dataclasses import dataclass

_CHECKED = "files and layout checked"


@dataclass(frozen=True)
class BundleChecks:
    """What is known of an exported bundle."""

    passed: bool
    """Whether its files and layout passed every check."""
    loaded_by: str | None = None
    """The engine that loaded it; None if none has, so that the bundle is unverified."""

    @property
    def words(self) -> str:
        """The verdict."""
        if not self.passed:
            return "unverified: a check of files and layout failed"
        if self.loaded_by is None:
            return f"unverified: {_CHECKED}; no engine has loaded it"
        return f"{_CHECKED}; {self.loaded_by} has loaded it"
