"""Damage of a whole assembly, learnt from assemblies that were measured (not in the papers, which stop at the sum).

The search adds up damages of single blocks. To second order the divergence from the parent is a quadratic form of the
error at the model's output, and to first order the errors of blocks add up. So with d_i the damage of layer i's block::

    damage(x) = sum_i d_i + sum_{i != j} c_ij sqrt(d_i d_j)

where c_ij is the correlation of the errors that two blocks make. The sum leaves the second term out. It is learnt: c_ij
is a common value plus one of each pair of blocks, both normally distributed around 0. The assemblies measured so far
then give the expected damage of any other (a Gaussian process), in closed form::

    k(x, y) = q(x) q(y) + 4 sum_{i < j} m_i m_j,   q(x) = sum_{i != j} sqrt(d_i d_j),   m_i = min(d_i(x), d_i(y))

The experts that a block keeps are among those of every larger block of its layer, so their errors overlap: they share
the smaller damage, m_i. Blocks that differ on another axis, such as the window, share nothing.

What is worth measuring is an assembly that may be better than the best one known, so not only what is expected counts,
but also how little is known of it.

Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, equations 2.25, 2.26 and 5.8; lower
confidence bounds, Srinivas et al., 2010.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesaic.models.architecture import Block
from moesaic.search.library import BlockLibrary, Choice, Table
from moesaic.search.solver.lagrangian import Floats, Indices, dense

_NOISE = 1e-2
"""Variance of what pairs of blocks do not explain, as a share of the mean variance of what they do."""

_TINY = 1e-300
OPTIMISM = 0.5
"""Standard deviations by which an assembly may be better than expected. On random problems of six layers, 17
measurements in rounds of four end 2 % above the best assembly there is with 0.5, 22 % with 0 and 16 % with 2; those
that follow in the order of their sums, 16 %."""


@dataclass(frozen=True)
class Evaluation:
    """An assembly that was run whole, and its damage."""

    choice: Choice
    damage: float


@dataclass(frozen=True, eq=False)
class _Blocks:
    """What is known of single blocks, by layer and variant."""

    scores: Floats
    damages: Floats
    """The same; those below 0, which some metrics have, count as 0."""
    kinds: Indices
    """Equal for blocks that differ in nothing but experts."""

    @classmethod
    def of(cls, library: BlockLibrary) -> "_Blocks":
        """What a library says of its blocks."""
        names = list({_smallest(block): None for options in library.variants for block in options})
        kinds = library.table(lambda block: float(names.index(_smallest(block))))
        scores = dense(library.damages)
        return cls(scores, np.maximum(scores, 0.0), dense(kinds).astype(np.int64))

    def sums(self, choices: Indices) -> Floats:
        """The sums of the scores of assemblies, [assembly layer]."""
        sums: Floats = self.scores[np.arange(choices.shape[1]), choices].sum(-1)
        return sums

    def covariance(self, first: Indices, second: Indices) -> Floats:
        """``k`` of every pair of assemblies, [first second]; assemblies are rows of variants."""
        layers = np.arange(first.shape[1])
        (d, w), (e, v) = ((self.damages[layers, rows], self.kinds[layers, rows]) for rows in (first, second))
        shared = np.where(w[:, None] == v, np.minimum(d[:, None], e), 0.0)
        pairs = 2 * (shared.sum(-1) ** 2 - (shared**2).sum(-1))
        covariance: Floats = np.multiply.outer(_cross_terms(d), _cross_terms(e)) + pairs
        return covariance

    def variance(self, choices: Indices) -> Floats:
        """``k`` of assemblies with themselves."""
        damages = self.damages[np.arange(choices.shape[1]), choices]
        variance: Floats = _cross_terms(damages) ** 2 + 2 * (damages.sum(-1) ** 2 - (damages**2).sum(-1))
        return variance


def _smallest(block: Block) -> Block:
    """The block with the fewest experts that differs from this one in nothing else."""
    return replace(block, num_experts=block.experts_per_token)


def _cross_terms(damages: Floats) -> Floats:
    """``q`` of assemblies, from their blocks' damages, [assembly layer]."""
    terms: Floats = np.sqrt(damages).sum(-1) ** 2 - damages.sum(-1)
    return terms


@dataclass(frozen=True, eq=False)
class LearntDamage:
    """The expected damage of any assembly, given those that were measured, and how far it may be off."""

    library: BlockLibrary
    blocks: _Blocks
    known: Indices
    """The measured assemblies, [evaluation layer]."""
    precision: Floats
    """The inverse of their covariance, [evaluation evaluation]."""
    missing: Floats
    """What their sums leave out, by evaluation."""

    @classmethod
    def of(cls, library: BlockLibrary, evaluations: Sequence[Evaluation]) -> "LearntDamage":
        """Learn from evaluations; without any, damages add up."""
        blocks = _Blocks.of(library)
        known = np.array([evaluation.choice for evaluation in evaluations], dtype=np.int64)
        known = known.reshape(len(evaluations), library.num_layers)
        covariance = blocks.covariance(known, known)
        noise = _NOISE * max(float(np.trace(covariance)), _TINY) / max(len(known), 1)
        precision = np.linalg.inv(covariance + noise * np.eye(len(known))).astype(np.float64)
        missing = np.array([evaluation.damage for evaluation in evaluations]) - blocks.sums(known)
        return cls(library, blocks, known, precision, missing)

    def expected(self, choices: Indices) -> Floats:
        """The expected damage of assemblies, [assembly layer]."""
        return self._expected(choices, self.blocks.covariance(choices, self.known))

    def promise(self, choices: Indices) -> Floats:
        """How small the damage of assemblies may well be (their lower confidence bound), [assembly layer]."""
        covariance = self.blocks.covariance(choices, self.known)
        return self._expected(choices, covariance) - OPTIMISM * self._deviation(choices, covariance)

    def around(self, choice: Choice) -> Table:
        """By layer and variant, what that variant adds to the promise if all other layers are as in ``choice``.

        An assembly's sum is its promise exactly if it differs from ``choice`` in one layer at most.
        """
        base = float(self.promise(np.array([choice]))[0])
        rows = []
        for layer, options in enumerate(self.library.variants):
            others = np.tile(np.array(choice), (len(options), 1))
            others[:, layer] = np.arange(len(options))
            rows.append(tuple((self.promise(others) - base + base / len(choice)).tolist()))
        return tuple(rows)

    def _expected(self, choices: Indices, covariance: Floats) -> Floats:
        expected: Floats = self.blocks.sums(choices) + covariance @ self.precision @ self.missing
        return expected

    def _deviation(self, choices: Indices, covariance: Floats) -> Floats:
        """Correlations are as large as the measurements say: the scale of ``k`` is the one of greatest likelihood."""
        scale = self.missing @ self.precision @ self.missing / max(len(self.known), 1)
        known = np.einsum("ij,jk,ik->i", covariance, self.precision, covariance)
        deviation: Floats = np.sqrt(scale * np.maximum(self.blocks.variance(choices) - known, 0.0))
        return deviation
