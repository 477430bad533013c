"""The stage that orders every layer's experts by importance; the mathematics is in ranking.py."""
