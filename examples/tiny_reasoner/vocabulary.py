"""The words of the tiny reasoner: every task is written in these, one token per word."""

SPECIAL = ("<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|unknown|>")
ROLES = ("system", "user", "assistant", "developer", "analysis", "final")
EFFORT_WORDS = ("Reasoning:", "low", "medium", "high")
DIGITS = tuple("0123456789")
SIGNS = ("+", "-", "*", "=", ";", ":", ">")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
STEPS = tuple(f"{number}." for number in range(1, 9))
LOGIC = ("true", "false", "and", "or", "xor", "not")
VERBS = ("add", "chain", "sort", "logic", "find", "from", "hops")
FILLER = (
    "the", "old", "was", "cold", "under", "near", "river", "road", "door", "and", "by", "night", "long", "wind",
    "house", "rain", "it", "slow", "over", "quiet", "field", "hill", "then", "lamp",
)  # fmt: skip
NAMES = (
    "amber", "anchor", "apple", "arrow", "badger", "bamboo", "basil", "beacon", "birch", "bison", "bramble",
    "bronze", "cabin", "cactus", "camel", "candle", "canyon", "cedar", "cherry", "clover", "cobalt", "comet",
    "copper", "coral", "cotton", "crane", "crimson", "crystal", "daisy", "delta", "diamond", "dragon", "eagle",
    "ebony", "ember", "falcon", "feather", "fern", "fig", "flint", "fox", "garnet", "ginger", "glacier", "granite",
    "hammer", "harbor", "hazel", "heron", "honey", "indigo", "iris", "island", "ivory", "jade", "jasmine", "jasper",
    "kettle", "kiwi", "lagoon", "lantern", "laurel", "lemon", "lilac", "linen", "lotus", "magnet", "maple",
    "marble", "meadow", "mint", "mirror", "nectar", "nutmeg", "olive", "onyx", "opal", "orchid", "otter", "panda",
    "pearl", "pepper", "pine", "plum", "poppy", "quartz", "raven", "ribbon", "robin", "ruby", "saffron", "sage",
    "salmon", "silver", "spruce", "sulfur", "tiger", "topaz", "tulip", "velvet", "walnut", "willow",
)  # fmt: skip

LATER = (
    "mul", "path", "subset", "solve", "latest", "total", "to", ",", "check", "ok", "no", "redo", "take", "left", "back",
    "dead", "compare",
)  # fmt: skip
"""Words of `examples.reasoner`, in places that were reserved."""


def words() -> tuple[str, ...]:
    """All words in token order, filled up with reserved words to 256 without repeats."""
    plain = dict.fromkeys(
        (*SPECIAL, *ROLES, *EFFORT_WORDS, *DIGITS, *SIGNS, *LETTERS, *STEPS, *LOGIC, *VERBS, *FILLER, *NAMES, *LATER)
    )
    return (*plain, *(f"<|reserved_{number}|>" for number in range(256 - len(plain))))
