"""The name of this process's user, who may have none: some clusters give containers a user id without one."""

import getpass

_NAMELESS = "moesaic"


def user_variables() -> dict[str, str]:
    """Environment variables with the user's name, or one that stands for it.

    Libraries ask ``getpass``, which looks here first, and fails if passwd has no entry either: NeMo AutoModel when it
    begins to train, PyTorch for its caches.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # KeyError up to Python 3.12
        name = _NAMELESS
    return {"LOGNAME": name, "USER": name}
