"""Deployment bundles: a checkpoint as a serving engine reads it, the files that start the engine, and their checks.

``bundled/`` holds what is copied into bundles as it is: the model modules for TensorRT-LLM and vLLM, which are written
to those engines' interfaces and are never imported here.
"""
