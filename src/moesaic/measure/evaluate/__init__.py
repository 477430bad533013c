"""The stage ``evaluate``: accuracy and generated tokens per request, at each effort."""
