"""The errors that speak to users. Each message says what failed, the value, what is allowed and what to do."""


class MoesaicError(Exception):
    """A failure that is explained in its message; the command line prints it without a traceback and exits 1."""

    exit_code = 1


class BadInputError(MoesaicError, ValueError):
    """What the user gave cannot be used; nothing expensive has been started. The command line exits 2."""

    exit_code = 2


class ConfigError(BadInputError):
    """A configuration value is unknown, of the wrong type or out of range."""


class ArtifactError(BadInputError):
    """A checkpoint, data set or stage output is missing, damaged or of the wrong kind."""


class InfeasibleError(BadInputError):
    """No architecture satisfies the limits; the message names the binding one and the best reachable value."""


class StageError(MoesaicError):
    """A stage could not finish, for a reason that is not the user's input (a full disk, a lost server)."""
