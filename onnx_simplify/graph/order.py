"""Nodes of messages: their order, the bodies inside them, and what these read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from onnx import AttributeProto, GraphProto, NodeProto

from onnx_simplify.errors import ModelError


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and those of the bodies inside, at any depth."""
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from all_nodes(body)


def sort_nodes(graph: GraphProto) -> None:
    """Sort the nodes topologically, in place; stable where the order is already valid.

    Raises:
        ModelError: there is a cycle, or two nodes produce the same tensor.
    """
    producer: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for name in node.output:
            if not name:
                continue
            if name in producer:
                raise ModelError(f"invalid graph: tensor '{name}' is produced twice")
            producer[name] = i
    sources = []
    for i, node in enumerate(graph.node):
        sources.append({producer[n] for n in _reads(node) if n in producer})
        if i in sources[i]:
            raise ModelError(f"invalid graph: node '{node.name or node.op_type}' reads itself")
    if all(source < i for i, own in enumerate(sources) for source in own):
        return
    order = _sorted(sources)
    if len(order) != len(graph.node):
        raise ModelError("invalid graph: its nodes form a cycle")
    nodes = [NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)


def _sorted(sources: list[set[int]]) -> list[int]:
    """Kahn's algorithm (1962): items behind all their sources; those of a cycle are left out."""
    users: dict[int, list[int]] = {}
    for i, own in enumerate(sources):
        for source in own:
            users.setdefault(source, []).append(i)
    needs = [len(own) for own in sources]
    ready = deque(i for i, n in enumerate(needs) if n == 0)
    order = []
    while ready:
        i = ready.popleft()
        order.append(i)
        for user in users.get(i, ()):
            needs[user] -= 1
            if needs[user] == 0:
                ready.append(user)
    return order


def _reads(node: NodeProto) -> Iterator[str]:
    """Names of the tensors a node reads, those captured by its bodies among them."""
    yield from node.input
    if has_body(node):
        yield from captured_names(node)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def has_body(node: NodeProto) -> bool:
    """Whether a node holds graphs, as ``If``, ``Loop`` and ``Scan`` do."""
    return any(_is_graph(a) for a in node.attribute)


def captured_names(node: NodeProto) -> set[str]:
    """Names that the bodies of a node use without defining them."""
    free: set[str] = set()
    for body in _bodies(node):
        local = {i.name for i in body.input} | {i.name for i in body.initializer}
        local |= {name for inner in body.node for name in inner.output}
        used = {name for inner in body.node for name in _reads(inner)}
        used |= {o.name for o in body.output}
        free |= used - local
    return free - {""}


def body_names(node: NodeProto) -> Iterator[str]:
    """All names that occur in the bodies of a node, at any depth."""
    for body in _bodies(node):
        yield from (i.name for i in (*body.input, *body.initializer, *body.output))
        for inner in body.node:
            yield from (*inner.input, *inner.output)
            yield from body_names(inner)


def _is_graph(attribute: AttributeProto) -> bool:
    return attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
