"""Train the reasoner: `python -m examples.reasoner.train --out DIR --processes 2`; the same command resumes."""

from examples.reasoner.tasks import SUITE
from examples.tiny_reasoner import train

RECIPE = train.Recipe(steps=2400, tokens_per_step=12288, shards=2, muon_lr=0.005, adam_lr=0.002, mixed=True)

if __name__ == "__main__":
    train.main(SUITE, RECIPE)
