"""Components take their images from the lock that building leaves, by digest."""

import json
from pathlib import Path

from components import images


def test_without_a_lock_images_have_the_releases_tag(tmp_path: Path) -> None:
    assert images.reference("search", tmp_path / "lock.json") == f"moesaic/search:{images.TAG}"


def test_with_a_lock_images_have_their_digest(tmp_path: Path) -> None:
    reference = f"registry.internal/moesaic/search:1.2.3@sha256:{'a' * 64}"
    (tmp_path / "lock.json").write_text(json.dumps({"images": {"search": {"image": reference}}}))
    assert images.reference("search", tmp_path / "lock.json") == reference
