"""Errors that the user can fix."""


class UserError(Exception):
    """A mistake of the user. The message is one line; programs print it and exit with code 2."""


class ConfigError(UserError):
    """A config field is unknown, has a wrong type or value, or contradicts another field."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
