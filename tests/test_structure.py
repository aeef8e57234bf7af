"""Who may import whom: a module imports its own layer and lower ones; imports within functions count."""

import ast
from pathlib import Path

import pytest

import dni_rnn

ROOT = Path(dni_rnn.__file__).parent
LAYERS = (
    "agreement files checks cores edges errors estimators feedforward gradient_quality interface "
    "local_loss metrics nets parent_process penalty pytree recurrent registry running_rms stashed "
    "synthesizer_call synthesizers traces two_rates window",
    "config",
    "data",
    "training",
    "distributed experiments",
    "commands",
    "cli",
    "__main__",
)
"""From low to high. Of the siblings in one line only those of the first, the core, import each other."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
MOST_LINES = 420
MODULES = {
    path.relative_to(ROOT): path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"
}


def imports(source: str) -> list[str]:
    """Full names of all that a module imports, but for type checkers alone."""
    tree = ast.parse(source)
    checked = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(inner) for node in checked for statement in node.body for inner in ast.walk(statement)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in skipped:
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and id(node) not in skipped:
            assert not node.level, "relative imports are not followed"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_what_counts_as_an_import():
    source = "import a.b\nif TYPE_CHECKING:\n    from c import d\nelse:\n    import g\n"
    assert imports(source + "def f():\n    from e import f") == ["a.b", "g", "e.f"]
    assert {path.parts[0].removesuffix(".py") for path in MODULES} <= set(LEVEL)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module(module):
    source, place = MODULES[module].read_text(), module.parts[0].removesuffix(".py")
    assert source.count("\n") <= MOST_LINES
    for name in imports(source):
        package, *rest = name.split(".")
        assert package != "dni_rnn_tasks", "the library knows no task"
        assert place != "config" or package != "torch", "help needs no torch"
        if package == "dni_rnn":
            assert rest[0] in LEVEL, f"{name}: name the module, not the package"
            here, there = LEVEL[place], LEVEL[rest[0]]
            assert there < here or rest[0] == place or there == here == 0, name


def test_every_folder_says_what_is_in_it():
    folders = {path.parent for path in ROOT.rglob("*.py")}
    assert len(folders) > 7
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
