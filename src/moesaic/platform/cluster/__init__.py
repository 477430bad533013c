"""A Kubernetes cluster as Moesaic sees it: what it has, and how that is given to the tasks of a compiled pipeline."""

from moesaic.platform.cluster.placement import place, placed_text
from moesaic.platform.cluster.profile import ClusterProfile, read_profile

__all__ = ["ClusterProfile", "place", "placed_text", "read_profile"]
