"""FILES -> docs/map.md. The house on one page, from the first line of every file."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "map.md"


def door_plate(file: Path) -> str:
    """The first line of a file's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text("utf-8")))
    assert text, f"{file} has no door plate"
    return text.splitlines()[0]


def map_page() -> str:
    """The whole page, rooms in the order of their floors is the reader's; here by name."""
    package = ROOT / "xverse"
    lines = ["# The map", "", "Written by `make docs` from the first line of every file.", ""]
    lines += ["## The front", "", "| file | what it does |", "|---|---|"]
    lines += [_row(file) for file in sorted(package.glob("*.py"))]
    for room in sorted(path.parent for path in package.glob("*/__init__.py")):
        lines += ["", f"## {room.name}/", "", door_plate(room / "__init__.py"), ""]
        files = [file for file in sorted(room.glob("*.py")) if file.name != "__init__.py"]
        if files:
            lines += ["| file | what it does |", "|---|---|", *map(_row, files)]
    return "\n".join(lines) + "\n"


def _row(file: Path) -> str:
    return f"| `{file.name}` | {door_plate(file)} |"


if __name__ == "__main__":
    PAGE.write_text(map_page(), "utf-8")
