"""A user id without an entry in passwd, as OpenShift gives: libraries that ask for a name get one."""

import getpass
import os

import pytest

from moesaic.core.user_name import user_variables
from tests.other_user import as_user, needs_root

NAMELESS = 54321


def test_a_user_with_a_name_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "someone")
    assert user_variables() == {"LOGNAME": "someone", "USER": "someone"}


@needs_root
def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def names() -> tuple[str, str]:
        with pytest.raises((KeyError, OSError)):
            getpass.getuser()
        os.environ.update(user_variables())
        return getpass.getuser(), os.environ["USER"]

    assert as_user(NAMELESS, 0, names) == ("moesaic", "moesaic")
