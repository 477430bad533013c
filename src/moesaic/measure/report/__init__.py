"""The report: what was found, on one self-contained page and in one JSON summary."""
