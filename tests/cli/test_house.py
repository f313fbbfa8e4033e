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


def members(tree):
    """The private methods, attributes and fields of the classes of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                names = [
                    getattr(part, "name", None),
                    getattr(getattr(part, "target", None), "id", None),
                ]
                if (
                    isinstance(part, ast.Assign)
                    and getattr(part.targets[0], "id", "") == "__slots__"
                ):
                    names += [getattr(e, "value", None) for e in ast.walk(part.value)]
                yield from (n for n in names if isinstance(n, str) and private(n))
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and private(node.attr)
        ):
            yield node.attr


def test_no_private_attribute_is_read_in_another_file():
    """Of torch's own private attributes it can tell those that no class here has a namesake of."""
    trees = {f: ast.parse(f.read_text()) for f in FILES}
    owned = {f: {*members(tree)} for f, tree in trees.items()}
    every = set().union(*owned.values())
    found = [
        f"{f.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for f, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in every - owned[f]
        if getattr(node.value, "id", None) not in ("self", "cls")
    ]
    assert found == []


def test_no_file_is_long():
    """For a reader: what takes more than 500 lines is about more than one thing."""
    ours = (
        p
        for d in ("benchmarks", "docs", "examples", "jactri", "kernels", "tests")
        for p in (ROOT / d).rglob("*.py")
    )
    assert {str(f.relative_to(ROOT)) for f in ours if f.read_text().count("\n") > 500} == set()


def test_every_file_says_what_it_is_for():
    assert [f for f in FILES if not ast.get_docstring(ast.parse(f.read_text()))] == []
