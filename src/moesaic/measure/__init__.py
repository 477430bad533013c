"""Measurements of parent and child: accuracy, speed, and the report that compares them."""
