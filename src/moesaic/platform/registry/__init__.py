"""The model registry in MLflow: versions of a model, and which of them is the champion."""
