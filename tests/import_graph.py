"""The imports between the modules of a package, read from their syntax trees; nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file; a package has the name of its folder."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module → modules of the same package that it imports anywhere: at the top, in functions, for type checking.

    `from package import name` counts as an import of `package.name` where that is a module, else of the module that
    `package/__init__.py` takes the name from.
    """
    trees = {module_name(path, root): ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
    exports = {name: _exports(tree) for name, tree in trees.items()}
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found = [(node.module, alias.name) for alias in node.names]
            else:
                continue
            for module, attribute in found:
                target = _target(module, attribute, trees, exports)
                if target is not None and target != name:
                    graph[name].add(target)
    return graph


def _exports(tree: ast.Module) -> dict[str, str]:
    """Name → module it is imported from, of the imports at a module's top level."""
    return {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _target(
    module: str, attribute: str | None, trees: dict[str, ast.Module], exports: dict[str, dict[str, str]]
) -> str | None:
    if attribute is not None and f"{module}.{attribute}" in trees:
        return f"{module}.{attribute}"
    if attribute is not None and attribute in exports.get(module, {}) and exports[module][attribute] in trees:
        return exports[module][attribute]
    return module if module in trees else None


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, the first one again at the end; None where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for other in sorted(graph[name]):
            cycle = visit(other)
            if cycle:
                return cycle
        path.pop()
        done.add(name)
        return None

    for name in sorted(graph):
        cycle = visit(name)
        if cycle:
            return cycle
    return None
