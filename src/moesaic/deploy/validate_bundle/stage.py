"""Loads a bundle in the engine that it is for, reads from it what each layer is, and holds its greedy replies against
transformers.

A bundle that no engine has loaded, because there is none for this machine, is called unverified; the task succeeds,
since that is a result.
"""

from typing import Annotated

from pydantic import Field

from moesaic.core.config import Amount, Config, Efforts, Positive, Precision
from moesaic.core.stage import Stage, artifact, dataset, model


class ValidateBundleConfig(Config):
    """What an engine that has loaded a bundle is asked, and how much its replies may differ from the reference."""

    ask_engine: bool = True
    """Whether the engine is asked; its environment is made on the first time. False: the bundle stays unverified."""
    efforts: Efforts = ("low", "medium", "high")
    """Each prompt is asked at each of them."""
    prompts_per_effort: Positive = 100
    """Prompts, spread evenly over the tasks of the set."""
    max_new_tokens: Positive = 128
    """Of one reply; a longer one is compared as far as it goes."""
    min_agreeing_replies: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Least share of replies, at each effort, that are the reference's token for token but for near ties."""
    near_tie: Amount = 0.6
    """A token that differs is one if the reference prefers its own by no more than this, in nats."""
    max_logprob_difference: Amount = 0.02
    """Largest mean difference of the log-probability of a token, in nats."""
    precision: Precision = "float32"
    """What the reference computes in."""
    engine_precision: Precision = "bfloat16"
    """What the engine computes in, and keeps an unquantised KV cache in. ``bfloat16`` is how it serves; ``float32``, on
    CPUs alone, leaves rounding out, so that what still differs is wrong."""
    compare_replies: bool = True
    """Whether there is a reference: it holds the whole model, unpacked, in this process. False where that does not
    fit; then the engine says what each layer is, and no more."""
    timeout_s: Amount = 3600.0
    """The engine must be done within this."""


STAGE = Stage(
    name="validate_bundle",
    config=ValidateBundleConfig,
    runtime="serve",
    inputs=(
        model("bundle", "an export bundle"),
        dataset("prompts", "what the engine is asked: problems, as for `generate_traces`"),
    ),
    outputs=(artifact("verdict", "`verdict.json`: which engine loaded it, what it said, how its replies compare"),),
)
