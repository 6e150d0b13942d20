"""Mistakes of the user's."""


class UserError(Exception):
    """A mistake of the user's, told in one line; entry points print it and exit with code 2."""


class ConfigError(UserError):
    """A field of a config is unknown, of the wrong type, or cannot be combined with another."""


def require(condition: bool, message: str) -> None:
    """Raises :class:`ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
