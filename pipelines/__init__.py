"""The pipelines as Kubeflow describes them: the order of the stages and their resources. Values come from recipes."""
