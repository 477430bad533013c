"""Foreign engines, one adapter each; an engine is imported where it runs, never with this package."""
