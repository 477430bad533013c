"""The stage ``ingest``: check the inputs of a pipeline run and hand on their manifests."""
