"""No file of the package can run what it reads: checked in the syntax tree of every one."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "xverse"
MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pickletools"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}
ARGUMENTS = {("weights_only", False), ("allow_pickle", True), ("shell", True)}
# `__init__` and `cli` load rooms and verbs of this package by names that stand in their own tables.
IMPORT_BY_NAME = {"__init__.py", "cli.py", "evals/tasks/__init__.py"}
# What a model wrote is run to be judged, by a process that can do nothing else.
SANDBOX = {"evals/sandbox_child.py": {"compile", "exec"}}


def findings(source: str, file: str) -> Iterator[str]:
    """What is forbidden in `source`, as "line: words"."""
    tree = ast.parse(source)
    names = _imported(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            continue
        if isinstance(node, ast.Import):
            words = _forbidden_module(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            words = _forbidden_module([node.module or ""])
        else:
            words = _forbidden_call(node, names, file)
        if words:
            yield f"{node.lineno}: {words}"


def _imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> full name, for `from a import b as c` and `import a as c`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
    return names


def _forbidden_module(modules: Iterable[str]) -> str:
    found = [module for module in modules if module.split(".")[0] in MODULES]
    return f"import of {found[0]}" if found else ""


def _forbidden_call(call: ast.Call, names: dict[str, str], file: str) -> str:
    head, _, rest = ast.unparse(call.func).partition(".")
    name = ".".join(filter(None, [names.get(head, head), rest])).removeprefix("builtins.")
    if name in CALLS and name not in SANDBOX.get(file, ()):
        return f"call of {name}"
    for keyword in call.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if (keyword.arg, value) in ARGUMENTS:
            return f"{keyword.arg}={value!r}"
    literal = bool(call.args) and isinstance(call.args[0], ast.Constant)
    if name == "importlib.import_module" and not literal and file not in IMPORT_BY_NAME:
        return "import of a module whose name is computed"
    return ""


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    found = []
    for file in files:
        path = file.relative_to(PACKAGE).as_posix()
        found += [f"xverse/{path}:{words}" for words in findings(file.read_text("utf-8"), path)]
    assert not found, "the package must never run what it reads:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill as d",
        "def f():\n    from joblib import load",
        "import multiprocessing, marshal",
        "eval('1')",
        "x = [exec(c) for c in code]",
        "compile(s, '', 'exec')",
        "import builtins\nbuiltins.eval(s)",
        "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=True)",
        "import torch as t\nt.load(p)",
        "from torch import load\nload(p)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "f(weights_only=False)",
        "import subprocess\nsubprocess.run(s, shell=True)",
        "import os\nos.system(s)",
        "from os import system as s\ns('x')",
        "import yaml\nyaml.load(s)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\nimport_module(f'x.{name}')",
    ],
)
def test_the_check_finds(source: str) -> None:
    assert list(findings(source, "other.py"))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import torch\ntorch.compile(f)",
        "from xverse.checkpoint.pickles import read_pickle",
        "import json\njson.load(f)",
        "import importlib\nimportlib.import_module('rich')",
        "subprocess.run(['ls'], shell=False)",
        "np.load(p, allow_pickle=False)",
    ],
)
def test_the_check_lets_pass(source: str) -> None:
    assert not list(findings(source, "other.py"))


def test_computed_imports_are_for_the_front_door_only() -> None:
    source = "import importlib\nimportlib.import_module(name)"
    assert not list(findings(source, "__init__.py"))
    assert not list(findings(source, "cli.py"))
    assert list(findings(source, "verbs/cli.py"))
