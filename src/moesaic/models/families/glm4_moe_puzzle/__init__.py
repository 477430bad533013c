"""The config and model class of a GLM-4.5 child; both modules travel inside its checkpoint."""
