"""Errors that the user can fix."""


class UserError(Exception):
    """A mistake of the user, or something that the user has to mend. Programs print the message, which is one line."""

    # Of a program that this error ends. A supervisor should not repeat a command that ends with 2.
    exit_code = 2


class ConfigError(UserError):
    """A config field is unknown, has a wrong type or value, or contradicts another field."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
