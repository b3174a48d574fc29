"""WORDS -> VERB. The first word chooses verbs/<word>.py; its dataclass says what may follow."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from xverse import __version__, log
from xverse.config import nearest, parse
from xverse.device import env
from xverse.errors import XverseError

VERBS = Path(__file__).parent / "verbs"


def run(args: Sequence[str]) -> int:
    """Do what the words ask. Exit codes: 0 done, 1 failed, 2 misused, 130 interrupted."""
    log.setup(env("XVERSE_LOG_LEVEL", "WARNING").upper())
    try:
        return _dispatch(list(args))
    except XverseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def verbs() -> dict[str, str]:
    """Every verb and its one line, read from the first lines of the files, importing none."""
    found = {}
    for file in sorted(VERBS.glob("[a-z]*.py")):
        with file.open(encoding="utf-8") as lines:
            found[file.stem.replace("_", "-")] = next(lines).strip().strip('"')
    return found


def _dispatch(args: list[str]) -> int:
    known = verbs()
    if args and args[0] in ("-h", "--help", "help"):
        print(_help(known))
        return 0
    if args and args[0] in ("-V", "--version", "version"):
        print(f"xverse {__version__}")
        return 0
    if args and args[0] in known:
        return _do(args[0], args[1:], known[args[0]])
    if args and not args[0].startswith("-") and _is_no_model(args[0]):
        raise XverseError(
            f"{args[0]!r} is neither a verb nor a model.{nearest(args[0], known)}",
            "The first word is a verb, a folder, a GGUF file, an alias or a hub id.",
            "Run `xverse --help` for the verbs.",
        )
    return _do("chat", args, known["chat"])


def _do(verb: str, args: list[str], description: str) -> int:
    module = import_module(f"xverse.verbs.{verb.replace('-', '_')}")
    config = parse(
        module.Config, _model_first(args), prog=f"xverse {verb}", description=description
    )
    code: int = module.run(config)
    return code


def _model_first(args: list[str]) -> list[str]:
    """`--model M`, as the published scripts have it, means the same as M in the first place."""
    if "--model" in args[:-1]:
        place = args.index("--model")
        return [args[place + 1], *args[:place], *args[place + 2 :]]
    return args


def _is_no_model(word: str) -> bool:
    """Whether a first word without slash, dot or digit, naming nothing here, must be a typo."""
    return word.isalpha() and not Path(word).exists()


def _help(known: dict[str, str]) -> str:
    width = max(map(len, known))
    lines = [f"  {verb:<{width}}  {line}" for verb, line in known.items()]
    return "\n".join(
        [
            f"xverse {__version__}: the XVERSE language models, from raw text to a chat.",
            "",
            "usage: xverse [MODEL]              talk to a model; without MODEL, the built-in one",
            "       xverse VERB [ARGUMENTS]     `xverse VERB --help` tells what each takes",
            "",
            *lines,
            "",
            "MODEL is a folder, a GGUF file, a hub id (xverse/XVERSE-7B-Chat) or an alias.",
        ]
    )
