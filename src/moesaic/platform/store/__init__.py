"""The content-addressed store: weights and data sets live here; pipelines pass on only their small manifests.

Layout under a root::

    objects/sha256/ab/<digest>          one file of a model or data set, in S3 one part of it, named by its content
    manifests/<id>.json                 what belongs together; committed last, so nothing half-written is ever visible
    records/<origin>.json               how a stage's output was made, see :mod:`moesaic.platform.runs.lineage`
    unlogged/<server>/<attempt>.json    what MLflow could not be told yet, see :mod:`moesaic.platform.runs.tracking`

A root is a directory or an S3 bucket. A store also has a local directory for what is rebuilt at will: ``trees/<id>``
(a manifest's files under their names) and, where the root is remote, the objects fetched so far.
"""

from moesaic.platform.store.content import Address, Store, parse_address
from moesaic.platform.store.manifest import FileEntry, Kind, Manifest
from moesaic.platform.store.root import DirectoryRoot, Item, Root
from moesaic.platform.store.s3_options import S3Options

__all__ = [
    "Address",
    "DirectoryRoot",
    "FileEntry",
    "Item",
    "Kind",
    "Manifest",
    "Root",
    "S3Options",
    "Store",
    "parse_address",
]
