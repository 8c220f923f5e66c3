"""LongRoPE2's search for RoPE factors (arXiv 2502.20082), for search_rope.py: evolution of one factor per pair of
dimensions.

A candidate is a real critical index d_rcd and factors lambda_j, ascending within [s, 2s], for the pairs j from it on,
s = target / original length. Below it the NTK rule leads from 1 up to lambda at d_rcd: lambda_j = lambda^(j / d_rcd).
Only the pairs from d_rcd on are mutated. The fitness, less being better, is the caller's: in the paper it is the
perplexity of the answers to needle questions. How far a mutation goes and how parents are mixed is this file's choice;
the paper leaves both open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PARENTS = 1 / 2
"""Share of a population that lives on; LongRoPE (2402.13753): 32 of 64."""

MUTANTS = 1 / 4
"""Share of a population that is mutated parents; all others are crossed. LongRoPE: 16 of 64."""

MUTATION_PROBABILITY = 0.3
"""Per factor; LongRoPE and LongRoPE2."""

MUTATION_SCALE = 0.1
"""Standard deviation of a mutation as a share of s; ours."""

DECIMALS = 2
"""Factors are multiples of 0.01, LongRoPE's step."""


def critical_index(theta: float, head_dim: int, original: int) -> int:
    """d_tcd: the first pair that does not turn once within the original length, ceil(D/2 log_theta(L0 / 2 pi))."""
    return math.ceil(head_dim / 2 * math.log(original / (2 * math.pi)) / math.log(theta))


def lower_bound(theta: float, head_dim: int, original: int) -> int:
    """d_10: the first pair that turns fewer than 10 times within the original length."""
    return math.ceil(head_dim / 2 * math.log(original / (20 * math.pi)) / math.log(theta))


@dataclass(frozen=True)
class Space:
    """What is searched: theta, head dimension D, original and target length."""

    theta: float
    head_dim: int
    original: int
    target: int

    @property
    def pairs(self) -> int:
        """D / 2."""
        return self.head_dim // 2

    @property
    def scale(self) -> float:
        """s, the smallest factor of a pair that does not turn once; the largest factor of any pair is 2s."""
        return self.target / self.original

    @property
    def indices(self) -> range:
        """The values that d_rcd can have: d_10 to d_tcd, within the pairs that exist."""
        last = min(max(critical_index(self.theta, self.head_dim, self.original), 1), self.pairs - 1)
        return range(min(max(lower_bound(self.theta, self.head_dim, self.original), 1), last), last + 1)


@dataclass(frozen=True)
class Candidate:
    """d_rcd, and the factors of the pairs from it on, ascending."""

    d_rcd: int
    high: tuple[float, ...]

    def factors(self) -> tuple[float, ...]:
        """lambda of every pair, [D / 2]: ascending from 1."""
        c = self.high[0]
        return tuple(c ** (j / self.d_rcd) for j in range(self.d_rcd)) + self.high


def _candidate(d_rcd: int, high: np.ndarray, space: Space) -> Candidate:
    """A candidate with these factors, clipped to [s, 2s] and sorted."""
    inside = np.sort(np.clip(np.round(high, DECIMALS), space.scale, 2 * space.scale))
    return Candidate(d_rcd, tuple(inside.tolist()))


def uniform(d_rcd: int, c: float, space: Space) -> Candidate:
    """The same factor c for all pairs from d_rcd on."""
    return _candidate(d_rcd, np.full(space.pairs - d_rcd, c), space)


def initial(space: Space, count: int, rng: np.random.Generator) -> list[Candidate]:
    """`count` different candidates: every d_rcd in turn with an integer c from [s, 2s]; a repetition is mutated."""
    candidates: dict[Candidate, None] = {}
    for i in range(count):
        d_rcd = space.indices[i % len(space.indices)]
        c = rng.integers(math.ceil(space.scale), math.floor(2 * space.scale) + 1)
        candidate = uniform(d_rcd, float(c), space)
        while candidate in candidates:
            candidate = mutate(candidate, space, rng)
        candidates[candidate] = None
    return list(candidates)


def mutate(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    """Each factor from d_rcd on (at least one) moves by a normal step with probability 0.3; then they are sorted."""
    high = np.array(candidate.high)
    chosen = rng.random(len(high)) < MUTATION_PROBABILITY
    chosen[rng.integers(len(high))] = True
    steps = rng.normal(0, MUTATION_SCALE * space.scale, len(high))
    return _candidate(candidate.d_rcd, high + chosen * steps, space)


def crossover(a: Candidate, b: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    """a's d_rcd; each factor from there on is a's or b's by chance; then they are sorted."""
    of_a, of_b = (np.array(x.factors()[a.d_rcd :]) for x in (a, b))
    return _candidate(a.d_rcd, np.where(rng.random(len(of_a)) < 0.5, of_a, of_b), space)


def evolve(
    space: Space,
    fitness: Callable[[Candidate], float],
    seed: int,
    population: int = 64,
    iterations: int = 40,
    on_iteration: Callable[[int, list[tuple[float, Candidate]]], None] | None = None,
) -> list[tuple[float, Candidate]]:
    """The last population with its fitnesses, best first; NaN counts as the worst.

    A pure function of its arguments: if fitness remembers its values, a search that was cut off repeats what it did in
    no time. on_iteration: called with the number of iterations done (0: the first population) and the population.
    """

    def rated(candidates: list[Candidate]) -> list[tuple[float, Candidate]]:
        values = ((fitness(c), c) for c in candidates)
        return [(math.inf if math.isnan(value) else value, c) for value, c in values]

    living = rated(initial(space, population, np.random.default_rng([seed, 0])))
    for iteration in range(iterations + 1):
        if iteration:
            rng = np.random.default_rng([seed, iteration])
            parents = living[: max(int(population * PARENTS), 1)]
            young = _offspring([c for _, c in parents], space, population, rng)
            living = parents + rated(young)
        living = sorted(living, key=lambda pair: pair[0])  # stable: of equals the elder first
        if on_iteration:
            on_iteration(iteration, living)
    return living


def _offspring(parents: list[Candidate], space: Space, population: int, rng: np.random.Generator) -> list[Candidate]:
    """New candidates, different from each other and from their parents: as many as fill the population."""
    young: dict[Candidate, None] = {}
    count, mutants = population - len(parents), int(population * MUTANTS)
    while len(young) < count:
        a = parents[rng.integers(len(parents))]
        # the first ones are mutated, and so is every mixture that exists already
        mixed = crossover(a, parents[rng.integers(len(parents))], space, rng) if len(young) >= mutants else a
        child = mixed if mixed not in young and mixed not in parents else mutate(mixed, space, rng)
        if child not in young and child not in parents:
            young[child] = None
    return list(young)
