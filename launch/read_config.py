"""The --config flag: an ml-collections config file whose every mistake is one line."""

import typing
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from fam_jax.config import Config, ConfigError, check_field, resolve

WORDS = {
    f"config.{group}.{field}"
    for group, fields in typing.get_type_hints(Config).items()
    for field, kind in typing.get_type_hints(fields).items()
    if kind == tuple[str, ...]
}


def define_config_flag(name: str) -> None:
    """Defines `--name=configs/FILE.py[:ARG]` and `--name.group.field=value`."""
    config_flags.DEFINE_config_file(
        name, help_string="Config file, get_config(arg) -> ConfigDict.", lock_config=True
    )


def resolved_config(name: str) -> Config:
    """The config that the command line asks for.

    Raises:
      ConfigError: a field is unknown, of the wrong type, or impossible.
    """
    return resolve(flags.FLAGS[name].value)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser for `app.run(flags_parser=...)`, with mistakes as one line.

    Raises:
      ConfigError: an unknown field, a value of the wrong type, an unknown flag, a config file that is not there.
    """
    _check_overrides(argv)
    try:
        return flags.FLAGS(_with_quoted_words(argv))
    except flags.Error as error:
        raise ConfigError(" ".join(f"{error}".split())) from error


def _with_quoted_words(argv: list[str]) -> list[str]:
    """Values of fields that are lists of words, such as a.txt,b.txt, in the quotes that config_flags asks for."""
    found, names_words = [], False
    for argument in argv:
        name, equals, value = argument.partition("=")
        if names_words or (name.lstrip("-") in WORDS and equals):
            head, text = ("", argument) if names_words else (name + equals, value)
            if not text.startswith(("(", "[")):
                argument = head + repr(tuple(word for word in text.split(",") if word))
        names_words = not names_words and name.lstrip("-") in WORDS and not equals
        found.append(argument)
    return found


def _check_overrides(argv: list[str]) -> None:
    """Before config_flags sees them: it tells of an unknown field in 45 lines."""
    config_file = None
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if name == "config":
            config_file = value if equals else following
            if not Path(config_file.partition(":")[0]).is_file():
                raise ConfigError(f"--config={config_file}: there is no such file")
        elif name.startswith("config."):
            if config_file is None:
                raise ConfigError(f"--{name}: must come after --config=FILE")
            check_field(name)
    if config_file is None and not {"--help", "--helpfull", "--helpshort", "-h"} & set(argv):
        raise ConfigError("--config=FILE is missing, for example --config=configs/passkey.py")
