"""What Kubeflow sees of the stages: one folder each, a signature and one call."""
