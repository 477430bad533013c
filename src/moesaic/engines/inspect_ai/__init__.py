"""inspect-ai, an evaluation harness, in an environment of its own: its pins are not ours.

It asks an OpenAI-compatible server the problems, whose prompts are token ids that were rendered here, has the replies
verified by :mod:`moesaic.verifiers`, and keeps a log that ``inspect view`` shows and that a killed run goes on from.
"""

from moesaic.engines.inspect_ai.asking import Answer, Inspect, Question, Rules, find_inspect

__all__ = ["Answer", "Inspect", "Question", "Rules", "find_inspect"]
