"""Configuration of a service: a frozen dataclass, filled from file < environment < flags.

    @dataclass(frozen=True)
    class RouterConfig:
        listen: str = "127.0.0.1:7000"
        \"\"\"Address of the gRPC server.\"\"\"        <- becomes the flag's help

    config = load(RouterConfig, sys.argv[1:], prog="router", description="...")

Every field has a default and a string under it. Types: str, int, float, bool, tuple[T, ...] of
those (comma-separated in environment and flags). A class may have `validate()`, which raises
ValueError naming the field.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import os
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from neo_common.documents import from_yaml

T = TypeVar("T")

ENVIRONMENT_PREFIX = "NEO_"
_SLIP = 0.9
"""How alike two names are, by difflib, when one is taken for a misspelling of the other."""
EXIT_BAD_CONFIG = 2


class ConfigError(ValueError):
    """One sentence that says which setting is wrong and what to do."""


def load(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    environment: Mapping[str, str] | None = None,
) -> T:
    """The effective configuration. Handles `--help` and `--print-config` (both end the process).
    Raises ConfigError."""
    arguments, unknown = _parser(cls, prog, description).parse_known_args(list(argv))
    if unknown:
        raise ConfigError(_unknown_flag(cls, unknown[0]))
    given = vars(arguments)
    values: dict[str, Any] = {}
    if given["config"]:
        values |= read_file(cls, Path(given["config"]))
    values |= read_environment(cls, os.environ if environment is None else environment)
    values |= {name: given[name] for name in _fields(cls) if given[name] is not None}
    config = build(cls, values)
    if given["print_config"]:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def load_or_exit(cls: type[T], argv: Sequence[str], *, prog: str, description: str) -> T:
    """`load`, with a ConfigError as one line on stderr and exit code 2."""
    try:
        return load(cls, argv, prog=prog, description=description)
    except ConfigError as error:
        fail(prog, str(error))


def fail(prog: str, message: str) -> NoReturn:
    """Refuse to start: one line on stderr, exit code 2, no traceback."""
    print(f"{prog}: {message}", file=sys.stderr)
    raise SystemExit(EXIT_BAD_CONFIG)


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance from plain values, each checked against its field's type."""
    known = _fields(cls)
    for name in values:
        _require_known(str(name), known, "")  # YAML's names may be numbers
    typed = {name: _typed(name, known[name], value) for name, value in values.items()}
    config = cls(**typed)
    validate = getattr(config, "validate", None)
    if validate is not None:
        try:
            validate()
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return config


def dump(config: Any) -> str:
    """The effective configuration as YAML that `--config` reads back."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False)


def read_file(cls: type[Any], path: Path) -> dict[str, Any]:
    try:
        values = from_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings")
    for name in values:
        _require_known(str(name), _fields(cls), f" in {path}")
    return values


def read_environment(cls: type[Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Settings from NEO_<FIELD>.

    A name that is one slip away from one of ours is an error. Others are not ours to judge:
    NEO_CPU_ISA belongs to the kernel, NEO_ROUTER_SERVICE_HOST comes from Kubernetes, and the shell
    may hold another service's settings."""
    known = {ENVIRONMENT_PREFIX + name.upper(): name for name in _fields(cls)}
    for key in environment:
        if key.startswith(ENVIRONMENT_PREFIX) and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=_SLIP)
            if near:
                raise ConfigError(f"unknown environment variable {key}; did you mean {near[0]}?")
    return {known[key]: value for key, value in environment.items() if key in known}


def _parser(cls: type[Any], prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="Settings come from --config FILE, then from the environment (NEO_<NAME>), then "
        "from flags; the last one wins.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings named as below")
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective settings and end"
    )
    docs = field_docs(cls)
    for field in ordered_fields(cls):
        default = field.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        text = f"{docs.get(field.name, '')} (default: {default if default != '' else 'empty'})"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=None,
            metavar="VALUE",
            help=text.replace("%", "%%"),
        )
    return parser


def _unknown_flag(cls: type[Any], word: str) -> str:
    """What is wrong with a word that the parser did not know."""
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return f"unexpected argument {word!r}; settings are given as --name value"
    known = ["--config", "--print-config", *("--" + n.replace("_", "-") for n in _fields(cls))]
    near = difflib.get_close_matches(flag, known, n=1)
    return f"unknown flag {flag}; " + (f"did you mean {near[0]}?" if near else "see --help")


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Field name -> the string under it in the source of the class and of those it inherits."""
    docs: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if dataclasses.is_dataclass(each):
            docs |= _own_docs(each)
    return docs


def ordered_fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    """As a reader wants them: the class's own first, inherited ones behind."""
    own = inspect.get_annotations(cls)
    return sorted(dataclasses.fields(cls), key=lambda field: field.name not in own)


def _own_docs(cls: type[Any]) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _fields(cls: type[Any]) -> dict[str, Any]:
    """Name -> type."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _require_known(name: str, known: Mapping[str, Any], where: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"
    raise ConfigError(f"unknown setting {name}{where}{hint}")


def _typed(name: str, kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} must be a list, not {value!r}")
        return tuple(_typed(name, item, part) for part in value)
    assert not isinstance(kind, types.UnionType), f"{name}: unions are not supported"
    if kind is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise ConfigError(f"{name} must be text, not {value!r}")
    if kind is bool:
        return _boolean(name, value)
    return _number(name, kind, value)


def _boolean(name: str, value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ConfigError(f"{name} must be true or false, not {value!r}")


def _number(name: str, kind: type[int] | type[float], value: Any) -> int | float:
    what = "a whole number" if kind is int else "a number"
    whole = isinstance(value, int | str)
    if isinstance(value, bool) or not (whole or (kind is float and isinstance(value, float))):
        raise ConfigError(f"{name} must be {what}, not {value!r}")
    try:
        number = kind(value)
    except OverflowError as error:
        raise ConfigError(f"{name} is too large") from error
    except ValueError as error:
        raise ConfigError(f"{name} must be {what}, not {value!r}") from error
    if number != number or number in (float("inf"), float("-inf")):
        raise ConfigError(f"{name} must be finite")
    return number
