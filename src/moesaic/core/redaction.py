"""Removal of secrets from text that is printed or logged: values of variables, and passwords in addresses."""

import re
from collections.abc import Mapping

HIDDEN = "***"
_NAME = re.compile(r"(?<!KMS_)KEY|SECRET|PASSW|TOKEN(?!IZ)|CREDENTIAL", re.IGNORECASE)
_NAMES_A_FILE = ("_FILE", "_PATH")
_IN_ADDRESS = re.compile(r"(://[^/@:\s]*:)([^/@\s]+)@")
_SHORTEST = 6
"""Length in characters; a shorter value is more likely a number or a switch than a secret."""


def names_secret(variable: str) -> bool:
    """Whether a variable of this name holds a secret: a key, password, token or credential, not the file of one."""
    return bool(_NAME.search(variable)) and not variable.upper().endswith(_NAMES_A_FILE)


def holds_password(value: str) -> bool:
    """Whether the text contains an address like ``http://user:password@host``."""
    return bool(_IN_ADDRESS.search(value))


def redact(text: str, variables: Mapping[str, str]) -> str:
    """Replace passwords in addresses, and the values of environment variables that hold secrets, by ``***``."""
    text = _IN_ADDRESS.sub(rf"\1{HIDDEN}@", text)
    for secret in sorted(_secrets(variables), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets(variables: Mapping[str, str]) -> set[str]:
    secrets = {match[2] for value in variables.values() for match in _IN_ADDRESS.finditer(value)}
    secrets |= {value for name, value in variables.items() if names_secret(name)}
    return {secret for secret in secrets if len(secret) >= _SHORTEST}
