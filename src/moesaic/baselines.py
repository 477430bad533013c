"""What the search is compared with, under the same limits (paper B, section on the effectiveness of its MIP).

greedy          from the parent, take again and again the replacement of one layer with the least added damage per
                excess it removes, excess being the sum over limits of the share by which each is exceeded, until all
                limits hold. Paper B describes its greedy search only in words; this reading is ours.
uniform         one expert count for all layers and one window for evenly spread full layers: of all that keep the
                limits, the one of least damage, so that the comparison is with the best of its kind.
random          one notch at a time (the next smaller expert count or window) in a random layer until all limits hold.
max_parameters  the MIP with parameters to maximise; damage is not looked at.

Greedy and random may end where no step helps although the limits can be kept; the reason is then reported.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from moesaic.architecture import Block
from moesaic.errors import InfeasibleError
from moesaic.library import BlockLibrary, Choice, total
from moesaic.limits import LimitSet
from moesaic.search import Search, Solution


def baselines(search: Search) -> dict[str, Callable[[], Solution]]:
    """Every baseline by name, to be called; an InfeasibleError says why one cannot keep the limits."""
    seeds = search.config.random_seeds
    return {
        "greedy": lambda: search.assembled(choose_greedily(search)),
        "uniform": lambda: search.assembled(choose_uniformly(search)),
        "max_parameters": lambda: keep_most_parameters(search),
    } | {f"random-{seed}": partial(_random, search, seed) for seed in seeds}


def _random(search: Search, seed: int) -> Solution:
    return search.assembled(shrink_randomly(search, seed))


def choose_greedily(search: Search) -> Choice:
    """The greedy baseline's choice; it is also the solver's first incumbent."""
    damages, limits = search.library.damages, search.limits
    choice = search.library.parent_choice
    while excess := limits.excess(choice):
        steps = []
        for step in _replacements(search.library, choice):
            removed = excess - limits.excess(step)
            if removed > 0:
                steps.append(((total(damages, step) - total(damages, choice)) / removed, -removed, step))
        if not steps:
            raise InfeasibleError(_stuck("greedy", "no replacement of one layer comes closer", limits, choice))
        choice = min(steps)[2]
    return choice


def _replacements(library: BlockLibrary, choice: Choice) -> Iterator[Choice]:
    """Every choice that narrows one layer."""
    for layer, options in enumerate(library.variants):
        now = options[choice[layer]]
        for index, block in enumerate(options):
            if block != now and block.narrows(now):
                yield (*choice[:layer], index, *choice[layer + 1 :])


def choose_uniformly(search: Search) -> Choice:
    """The uniform baseline's choice."""
    library = search.library
    counts = sorted({block.num_experts for options in library.variants for block in options})
    windows = sorted({block.window for options in library.variants for block in options if block.window is not None})
    num_full = sum(block.window is None for block in library.parent.blocks)
    patterns = product(counts, windows or [1], range(num_full + 1))
    choices = {
        choice
        for count, window, turned in patterns
        if (choice := _uniform(library, count, window, turned)) and search.limits.holds(choice)
    }
    if not choices:
        raise InfeasibleError("uniform: no single expert count, with one window in evenly spread layers, is enough")
    return min(choices, key=lambda choice: (total(library.damages, choice), choice))


def _uniform(library: BlockLibrary, count: int, window: int, turned: int) -> Choice | None:
    """``count`` experts everywhere and ``window`` in ``turned`` evenly spread full layers; None if not on offer."""
    full = [layer for layer, block in enumerate(library.parent.blocks) if block.window is None]
    spread = {full[int((index + 0.5) * len(full) / turned)] for index in range(turned)}
    parent = enumerate(library.parent.blocks)
    blocks = [Block(count, window if layer in spread else block.window) for layer, block in parent]
    if any(block not in options for block, options in zip(blocks, library.variants, strict=True)):
        return None
    return tuple(options.index(block) for block, options in zip(blocks, library.variants, strict=True))


def shrink_randomly(search: Search, seed: int) -> Choice:
    """The random baseline's choice for a seed."""
    dice = random.Random(seed)
    choice = search.library.parent_choice
    while not search.limits.holds(choice):
        steps = list(_notches(search.library, choice))
        if not steps:
            raise InfeasibleError(_stuck(f"random-{seed}", "every layer is as small as it gets", search.limits, choice))
        choice = dice.choice(steps)
    return choice


def _notches(library: BlockLibrary, choice: Choice) -> Iterator[Choice]:
    """Every choice that narrows one layer with nothing on offer in between."""
    for step in _replacements(library, choice):
        layer = next(layer for layer in range(len(choice)) if step[layer] != choice[layer])
        options = library.variants[layer]
        old, new = options[choice[layer]], options[step[layer]]
        if not any(block not in (old, new) and new.narrows(block) and block.narrows(old) for block in options):
            yield step


def keep_most_parameters(search: Search) -> Solution:
    """The max-parameters baseline."""
    fewer = search.library.cost_table(lambda cost: -float(cost.parameters))
    return search.solved(search.minimise(fewer, search.limits), objective="-parameters")


def _stuck(name: str, why: str, limits: LimitSet, choice: Choice) -> str:
    return f"{name}: {why}, and still broken is {'; '.join(limits.broken(choice))}"
