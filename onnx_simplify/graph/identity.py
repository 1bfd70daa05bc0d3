"""Sets and mappings of nodes, which compare by content and so have no hash of their own.

Nodes count as the same only if they are the same object. The collections hold their nodes, so that
no other object can come by the identity of one that is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, MutableSet
from typing import TypeVar

import onnx_graphsurgeon as gs

Value = TypeVar("Value")


class NodeMap(MutableMapping[gs.Node, Value]):
    """A mapping from nodes, in the order in which they were entered."""

    def __init__(self, items: Iterable[tuple[gs.Node, Value]] = ()):
        """Enter pairs of a node and a value."""
        self._entries: dict[int, tuple[gs.Node, Value]] = {}
        self.update(items)

    def __getitem__(self, node: gs.Node) -> Value:
        """The value of a node.

        Raises:
            KeyError: it has none.
        """
        return self._entries[id(node)][1]

    def __setitem__(self, node: gs.Node, value: Value) -> None:
        """Give a node a value."""
        self._entries[id(node)] = node, value

    def __delitem__(self, node: gs.Node) -> None:
        """Forget a node.

        Raises:
            KeyError: it has no value.
        """
        del self._entries[id(node)]

    def __contains__(self, node: object) -> bool:
        """Whether a node has a value."""
        return id(node) in self._entries

    def __iter__(self) -> Iterator[gs.Node]:
        """The nodes."""
        return (node for node, _ in self._entries.values())

    def __len__(self) -> int:
        """How many nodes have a value."""
        return len(self._entries)


class NodeSet(MutableSet[gs.Node]):
    """A set of nodes, in the order in which they were added."""

    def __init__(self, nodes: Iterable[gs.Node] = ()):
        """Add nodes."""
        self._nodes = {id(node): node for node in nodes}

    def __contains__(self, node: object) -> bool:
        """Whether a node is a member."""
        return id(node) in self._nodes

    def __iter__(self) -> Iterator[gs.Node]:
        """The nodes."""
        return iter(self._nodes.values())

    def __len__(self) -> int:
        """How many there are."""
        return len(self._nodes)

    def add(self, node: gs.Node) -> None:
        """Add a node."""
        self._nodes[id(node)] = node

    def discard(self, node: gs.Node) -> None:
        """Remove a node, if it is a member."""
        self._nodes.pop(id(node), None)
