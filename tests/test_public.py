"""What the package offers: every public name can be imported and says what it is."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import dni_rnn
import dni_rnn_tasks

MODULES = [
    "dni_rnn",
    "dni_rnn_tasks",
    *(
        module.name
        for package in (dni_rnn, dni_rnn_tasks)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ),
]
PACKAGE: Any = dni_rnn
"""As it is at run time, where its stub is read."""
PROGRAM = "dni_rnn.__main__"
"""Runs when it is imported."""


def own_members(module):
    """The public classes and functions that a module defines itself."""
    for name, value in vars(module).items():
        kind = inspect.isclass(value) or inspect.isfunction(value)
        if kind and value.__module__ == module.__name__ and not name.startswith("_"):
            yield f"{module.__name__}.{name}", value


def described(value):
    """Whether somebody wrote a docstring; those that dataclasses and named tuples make do not count."""
    text = (value.__doc__ or "").strip()
    return len(text) > 10 and not text.startswith(f"{value.__name__}(")


def test_described():
    import dataclasses
    from typing import NamedTuple

    class Tuple(NamedTuple):
        some_field: int

    record = dataclasses.make_dataclass("Record", [("some_field", int)])
    assert [described(value) for value in (Tuple, record, test_described, dni_rnn)] == [
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("name", PACKAGE.__all__)
def test_public_names(name):
    value = getattr(dni_rnn, name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert described(value), f"dni_rnn.{name} has no docstring"
    assert value.__module__.startswith("dni_rnn.")


def test_all_is_whole():
    assert len(set(PACKAGE.__all__)) == len(PACKAGE.__all__)
    namespace = {}
    exec("from dni_rnn import *", namespace)
    assert set(PACKAGE.__all__) == namespace.keys() - {"__builtins__"}
    assert set(PACKAGE.__all__) <= set(dir(dni_rnn))
    listed = (Path(dni_rnn.__file__).parent / "__init__.pyi").read_text()
    assert set(PACKAGE.__all__) == {
        alias.asname for node in ast.parse(listed).body for alias in getattr(node, "names", [])
    }


def test_unknown_names():
    with pytest.raises(AttributeError, match="No dni_rnn attribute Transformer"):
        _ = PACKAGE.Transformer
    assert not hasattr(dni_rnn, "torch")
    with pytest.raises(ImportError):
        exec("from dni_rnn import nothing_of_the_kind")


def test_the_package_itself_is_light():
    code = (
        "import sys, dni_rnn; early = 'torch' in sys.modules; dni_rnn.Interface; "
        "print(early, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"


def test_modules_are_found():
    found = (
        "interface",
        "cli",
        "cores",
        "estimators.full",
        "config.recurrent",
        "training.loop",
        "commands.train",
    )
    assert {f"dni_rnn.{name}" for name in found} | {"dni_rnn_tasks.text", PROGRAM} <= set(MODULES)
    files = [path for package in (dni_rnn, dni_rnn_tasks) for path in Path(package.__path__[0]).rglob("*.py")]
    assert len(MODULES) == len(set(MODULES)) == len(files)


@pytest.mark.parametrize("name", [name for name in MODULES if name != PROGRAM])
def test_docstrings(name):
    module = import_module(name)
    assert module.__doc__
    assert len(module.__doc__.strip()) > 10
    undocumented = [where for where, value in own_members(module) if not described(value)]
    assert undocumented == []
