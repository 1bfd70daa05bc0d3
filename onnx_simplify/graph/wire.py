"""Separate the bulk of a serialized model, the raw data of its initializers, from the rest.

Parsing a model file copies every weight twice before the first one is used.  The protobuf wire
format (https://protobuf.dev/programming-guides/encoding/) makes it easy to find the weights without
parsing: a message is a sequence of (tag, payload) pairs.  The skeleton that remains is a few
kilobytes and goes through the ordinary parser.
"""

from __future__ import annotations

# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9


class _Malformed(Exception):
    pass


def split_raw_data(data: memoryview, limit: int) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """Cut ``raw_data`` fields of more than ``limit`` bytes out of a serialized ``ModelProto``.

    Args:
        data: the serialized model.
        limit: payloads up to this size stay where they are.

    Returns:
        The serialized model without these payloads, and for each affected initializer (by its index
        in ``graph.initializer``) the (start, stop) of its payload in ``data``.  Input that does not
        follow the wire format comes back whole, for the real parser to complain about.
    """
    spans: dict[int, tuple[int, int]] = {}
    try:
        graphs = [f for f in _fields(data, 0, len(data)) if f[0] == GRAPH and f[1] == 2]
        if len(graphs) != 1:
            return bytes(data), {}
        _, _, graph_head, graph_start, graph_stop = graphs[0]
        pieces: list[bytes | memoryview] = []
        index = -1
        for number, kind, head, start, stop in _fields(data, graph_start, graph_stop):
            if number != INITIALIZER or kind != 2:
                pieces.append(data[head:stop])
                continue
            index += 1
            raw = [f for f in _fields(data, start, stop) if f[0] == RAW_DATA and f[1] == 2]
            if len(raw) != 1 or raw[0][4] - raw[0][3] <= limit:
                pieces.append(data[head:stop])
                continue
            _, _, raw_head, raw_start, raw_stop = raw[0]
            spans[index] = (raw_start, raw_stop)
            body = bytes(data[start:raw_head]) + bytes(data[raw_stop:stop])
            pieces += [length_prefix(INITIALIZER, len(body)), body]
        graph = b"".join(pieces)
        head = bytes(data[:graph_head]) + length_prefix(GRAPH, len(graph))
        return head + graph + bytes(data[graph_stop:]), spans
    except _Malformed:
        return bytes(data), {}


def length_prefix(number: int, length: int) -> bytes:
    """What stands in front of a field of bytes or of a message: its tag and its length."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: memoryview, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Malformed


def _fields(data: memoryview, at: int, stop: int):  # type: ignore[no-untyped-def]
    """Yield (number, wire type, start of tag, start of payload, end) of each field."""
    while at < stop:
        head = at
        tag, at = _read_varint(data, at, stop)
        kind = tag & 7
        start = at
        if kind == 0:
            _, at = _read_varint(data, at, stop)
        elif kind == 1:
            at += 8
        elif kind == 2:
            length, start = _read_varint(data, at, stop)
            at = start + length
        elif kind == 5:
            at += 4
        else:
            raise _Malformed
        if at > stop:
            raise _Malformed
        yield tag >> 3, kind, head, start, at
