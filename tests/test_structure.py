"""The structure of the code: what is below what, and who may know whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import onnx_graphsurgeon as gs
import pytest

from onnx_simplify.graph.identity import NodeMap, NodeSet
from onnx_simplify.operators import Operator

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("onnx_simplify", "torch_bridge")
# Rooms of the engine, lowest first: imports run down, or stay inside.
FLOORS = (
    ("errors", "version", "isolation"),
    ("graph",),
    ("channels",),
    ("operators",),
    ("facts",),
    ("planning", "runtime"),
    ("passes",),
    ("report", "reasons", "options"),
    ("schedule",),
    ("pipeline",),
    ("worker", "api", "streams", "tables"),
    ("cli", "__init__", "__main__"),
)


def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts)] = ast.parse(path.read_text())
    return found


MODULES = modules()


def targets(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of what a statement imports from the packages."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
        for alias in node.names:
            yield node.module, alias.name
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] in PACKAGES:
                yield alias.name, ""


def imports(tree: ast.Module, *, lazy: bool) -> set[str]:
    """The modules that a module imports, also inside functions if ``lazy``."""
    found = set()
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not lazy and id(node) in inside:
            continue
        for module, name in targets(node):
            for candidate in (f"{module}.{name}", module, f"{module}.__init__"):
                if candidate in MODULES:
                    found.add(candidate)
                    break
    return found


def room(module: str) -> str:
    """The room of a module of the engine."""
    return module.split(".")[1]


def test_imports_run_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for module, tree in MODULES.items():
        if not module.startswith("onnx_simplify."):
            continue
        # The package itself loads its parts when they are asked for.
        lazy = module != "onnx_simplify.__init__"
        for other in imports(tree, lazy=lazy):
            if other.startswith("onnx_simplify."):
                assert floor[room(other)] <= floor[room(module)], f"{module} imports {other}"


def test_there_are_no_circles():
    graph = {module: imports(tree, lazy=False) - {module} for module, tree in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in sorted(graph[module]):
                walk(other, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_private_names_stay_in_their_module():
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            for other, name in targets(node):
                private = name.startswith("_") and not name.startswith("__")
                assert not private, f"{module}: {other}.{name}"


def subclasses(kind: type) -> Iterator[type]:
    for sub in kind.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_nobody_asks_which_class_an_operator_is_of():
    names = {"Operator", *(c.__name__ for c in subclasses(Operator))}
    assert {"Convolution", "Contraction", "Concat"} < names
    for module, tree in MODULES.items():
        if module.startswith("onnx_simplify.operators."):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                # A key may be anything; what it is, is not asked.
                assert not asked & (names - {"Operator"}), f"{module}:{node.lineno}"


@pytest.mark.parametrize("rule", ["C901", "PLR0913"])
def test_limits_are_on(rule):
    assert f'"{rule}"' in (ROOT / "pyproject.toml").read_text()


def test_nothing_is_keyed_by_the_identity_of_a_node():
    """Nodes have :mod:`onnx_simplify.graph.identity`; an id may belong to another one tomorrow."""
    attributes = "onnx_simplify.passes.clean"  # compares values that nodes hold meanwhile
    for module, tree in MODULES.items():
        if module.startswith("onnx_simplify.") and module != "onnx_simplify.graph.identity":
            calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
            found = [c.lineno for c in calls if getattr(c.func, "id", "") == "id"]
            assert len(found) <= (module == attributes), f"{module}: {found}"


def test_collections_of_nodes():
    first, second = (gs.Node(op="Relu") for _ in range(2))
    assert first == second
    counts = NodeMap([(first, 1)])
    counts[second] = 2
    assert (list(counts.values()), counts.get(first), gs.Node(op="Relu") in counts) == (
        [1, 2],
        1,
        False,
    )
    del counts[first]
    assert [node is second for node in counts] == [True]
    nodes = NodeSet([first])
    assert second not in nodes and first in nodes and len(nodes | NodeSet([second])) == 2
    nodes.discard(second)
    nodes.discard(first)
    assert not nodes
