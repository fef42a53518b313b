"""What the import contracts cannot see: `corrsteer.kernels`, which lies outside the package's folder, and strings."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTERS = {"import_module", "find_spec", "__import__", "load"}  # `load` is that of `ops/extensions.py`


def modules(folder):
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in sorted(folder.rglob("*.py"))]


def imported(tree):
    """Modules that are imported anywhere in a file, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            assert node.level == 0, "relative imports hide which room is used"


def named(tree):
    """What is imported by a string: the literal, or the beginning of an f-string with its changing part as {}."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in IMPORTERS:
            what = node.args[0]
            if isinstance(what, ast.Constant) and isinstance(what.value, str):
                yield what.value
            elif isinstance(what, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in what.values)


def test_kernels_use_nothing_of_the_package_but_one_another():
    found = {name for _, tree in modules(ROOT / "kernels") for name in (*imported(tree), *named(tree))}
    ours = {name for name in found if name.split(".")[0] == "corrsteer"}
    assert ours and all(name.startswith("corrsteer.kernels.") for name in ours), ours


def test_only_the_triton_backend_reaches_for_the_kernels_and_nobody_imports_the_extensions_but_by_their_loader():
    users = {}
    for path, tree in modules(ROOT / "corrsteer"):
        assert not any(name.startswith("corrsteer.kernels") for name in imported(tree)), path
        for name in named(tree):
            if name.startswith(("corrsteer", "_")):
                users.setdefault(name, set()).add(path)
    assert users == {
        "corrsteer.kernels": {"corrsteer/ops/triton_backend.py"},
        "corrsteer.kernels.operations": {"corrsteer/ops/triton_backend.py"},
        "corrsteer.{}": {"corrsteer/__init__.py", "corrsteer/ops/extensions.py"},
        "_native": {"corrsteer/ops/native_backend.py"},
        "_cuda": {"corrsteer/ops/cuda_backend.py"},
    }
