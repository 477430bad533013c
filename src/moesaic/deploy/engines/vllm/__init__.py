"""vLLM as an engine: its environment, and what it says of a bundle that it has loaded."""
