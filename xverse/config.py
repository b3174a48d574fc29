"""DATACLASS <-> TOML <-> FLAGS. One dataclass says what a verb takes; the rest follows from it."""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from xverse.errors import XverseError

Config = TypeVar("Config")


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest of `known`, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def parse(
    config_class: type[Config], args: Sequence[str], *, prog: str, description: str
) -> Config:
    """An instance from command-line flags, over a TOML file named by --config, over defaults.

    Prints usage and exits with 2 where a flag is wrong, and with 0 after --help.
    """
    import tyro

    rest, file = _take_config_flag(args)
    values = read_toml(file, config_class) if file else {}
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    defaults = {field.name: values[field.name] for field in fields if field.name in values}
    missing = {
        field.name: tyro.MISSING
        for field in fields
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in defaults
    }
    default: Any = config_class(**defaults, **missing)
    more = "\n\n--config FILE reads any of these options from a TOML file; flags win over it."
    return tyro.cli(
        config_class,
        args=rest,
        prog=prog,
        description=description + more,
        default=default,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
    )


def read_toml(file: Path, config_class: type[Any]) -> Mapping[str, object]:
    """The table of a TOML file, every key of it a field of `config_class`.

    Raises XverseError for a file that is missing or no TOML, and for an unknown key, naming the
    nearest known one.
    """
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise XverseError(
            f"The configuration {str(file)!r} cannot be read.",
            str(error),
            "Give a TOML file, one `option = value` a line.",
        ) from error
    return _fields(file, table, config_class)


def _fields(
    file: Path, table: Mapping[str, object], config_class: type[Any], within: str = ""
) -> Mapping[str, object]:
    """The values of a table; one that a dataclass stands for becomes an instance of it."""
    types = get_type_hints(config_class)
    known = [field.name for field in dataclasses.fields(config_class)]
    values: dict[str, object] = {}
    for key, value in table.items():
        if key not in known:
            raise XverseError(
                f"{file}: there is no option {within + key!r}.{nearest(key, known)}",
                f"Known are: {', '.join(known)}.",
                "Correct or remove that line.",
            )
        kind = types[key]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if not isinstance(value, Mapping):
                raise XverseError(
                    f"{file}: {within + key!r} is a table of options, not {value!r:.60}.",
                    f"It holds: {', '.join(field.name for field in dataclasses.fields(kind))}.",
                    f"Write a line [{within + key}], and its options below it.",
                )
            value = kind(**_fields(file, value, kind, f"{within}{key}."))
        values[key] = value
    return values


def _take_config_flag(args: Sequence[str]) -> tuple[list[str], Path | None]:
    rest, file = list(args), None
    for index, arg in enumerate(rest):
        if arg == "--config" and index + 1 < len(rest):
            file = Path(rest[index + 1])
            del rest[index : index + 2]
            break
        if arg.startswith("--config="):
            file = Path(arg.removeprefix("--config="))
            del rest[index]
            break
    return rest, file
