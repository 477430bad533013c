"""The report: the results of a run on one self-contained page and in one JSON summary."""
