"""The stage ``gather_recovery``: collect one model's evaluations over the stages of recovery."""
