"""The content-addressed store: weights and data sets live here; pipelines pass on only their small manifests.

Layout under a root::

    objects/sha256/ab/<digest>   one file of a model or data set, named by its content
    manifests/<id>.json          what belongs together; committed last, so nothing half-written is ever visible

A store also has a local directory for what is rebuilt at will: ``trees/<id>`` (a manifest's files under their names).
"""

from moesaic.store.content import Store
from moesaic.store.manifest import FileEntry, Kind, Manifest
from moesaic.store.root import DirectoryRoot, Root

__all__ = ["DirectoryRoot", "FileEntry", "Kind", "Manifest", "Root", "Store"]
