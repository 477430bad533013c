"""The stage ``promote``: register a child and make it the champion if it passes the gate."""
