"""The stage ``validate_bundle``."""
