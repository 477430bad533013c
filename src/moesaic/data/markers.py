"""What control tokens look like in text, and how text that looks the same is told apart.

A marker such as ``<|start|>`` is a control token to a chat template and to whoever reads a reply. Where somebody has
written the same characters, a guard inside them keeps them text.
"""

import re

MARKER = re.compile(r"<\|(\w+)\|>")
GUARDS = [chr(number) for number in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters: text that is exchanged has none of them."""
GUARD = GUARDS[0]
"""The one in replies."""


def guard_markers(text: str, markers: re.Pattern[str] = MARKER, guard: str = GUARD) -> str:
    """The text with a guard in each of its markers."""
    return markers.sub(lambda marker: marker[0][0] + guard + marker[0][1:], text)
