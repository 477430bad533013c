"""The config and model class of a gpt-oss child; both modules travel inside its checkpoint."""
