"""ANSWER -> JUDGEMENT. Whether a program is valid Python. It is never run."""

import ast
import re
import warnings

from xverse.evals.item import Judgement

MAX_LINES = 200  # of code without marks, whose end is looked for by parsing
_BLOCK = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)(?:^ *```|\Z)", re.S | re.M)
_START = re.compile(r"(?:import|from|def|class|async def)\s|@\w")


def python(answer: str, defines: str) -> Judgement:
    """A block of the answer, or without blocks its first lines of code, is valid Python and
    defines the function `defines`, with something in it."""
    blocks = [body for tag, body in _BLOCK.findall(answer) if tag.lower() in ("", "python", "py")]
    wanted = re.compile(rf"def\s+{re.escape(defines)}\b")
    program = next((body for body in blocks if wanted.search(body)), None)
    if program is None:
        program = _bare(answer) if not blocks else None
    if program is None or not wanted.search(program):
        return Judgement(False, f"has no Python that defines {defines}")
    if (wrong := _error(program)) is not None:
        return Judgement(False, f"has Python that is not valid: {wrong}")
    if not _does_something(program, defines):
        return Judgement(False, f"does not define {defines} with anything in it")
    return Judgement(True, f"is valid Python and defines {defines}")


def _bare(answer: str) -> str | None:
    """The code of an answer that does not mark it: from the first line that begins like Python to
    before the line that does not go on so; what is indented still belongs to it."""
    lines = answer.splitlines()
    start = next((n for n, line in enumerate(lines) if _START.match(line)), None)
    if start is None:
        return None
    lines = lines[start : start + MAX_LINES]
    ends = [n for n in range(1, len(lines)) if lines[n][:1].strip()] + [len(lines)]
    programs = ("\n".join(lines[:end]) for end in reversed(ends))
    # The longest that is valid; where none does, the first piece tells why.
    return next((each for each in programs if _error(each) is None), "\n".join(lines[: ends[-1]]))


def _error(program: str) -> str | None:
    """Why it is no valid Python, None where it is. Hostile nesting ends in an error, too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(program)
    except SyntaxError as error:
        return f"{error.msg}, line {error.lineno}"
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        return type(error).__name__
    return None


def _does_something(program: str, name: str) -> bool:
    """Whether the function has more than a docstring, `pass` and `...`."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(program)) if isinstance(n, functions) and n.name == name]
    return any(
        not isinstance(line, ast.Pass)
        and not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for node in nodes
        for line in node.body
    )
