"""The stage ``benchmark``: prefill and decode speed of parent and child on this device."""
