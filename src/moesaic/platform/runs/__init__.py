"""Running stages and pipelines, and recording each run: records, lineage, MLflow."""
