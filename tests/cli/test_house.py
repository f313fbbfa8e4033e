"""What holds for all files of the package: what import-linter does not look at."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(p for d in ("jactri", "kernels") for p in (ROOT / d).rglob("*.py"))


def private(name):
    return name.startswith("_") and not name.startswith("__")


def of_others(tree):
    """The private names of other files that a file uses."""
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from (a.name for a in node.names if private(a.name) and a.name != "_src")
            imported |= {a.asname or a.name for a in node.names} - own
    for node in ast.walk(tree):
        of = getattr(getattr(node, "value", None), "id", None)
        if isinstance(node, ast.Attribute) and of in imported and private(node.attr):
            yield f"{of}.{node.attr}"


def test_no_private_name_crosses_a_file():
    found = {str(f.relative_to(ROOT)): [*of_others(ast.parse(f.read_text()))] for f in FILES}
    assert {f: names for f, names in found.items() if names} == {}


def test_every_file_says_what_it_is_for():
    assert [f for f in FILES if not ast.get_docstring(ast.parse(f.read_text()))] == []
