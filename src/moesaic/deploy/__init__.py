"""Deployment: export bundles, a server of our own, and the engines that serve."""
