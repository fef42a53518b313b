"""Files and values with something wrong in them, by a seeded generator."""

import json
import math
import struct

STRANGE = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**30, 0.5, -0.0, 1e308, math.nan, math.inf, "", "x",
    "\ud800", "\x00", "\u202e\u05d0\u4e2d\u6587", "1e999", "../../x", "a" * 5000, [], {}, [[]], [None], {"": 1},
    [1, "a", None], {"a": {"b": []}},
)  # fmt: skip
STRANGE_BYTES = (b"\x00", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"]", b'"', b"\\u", b"\r", b",")
DEEP = 3000


def deep(rng):
    """A value that holds itself many times."""
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return opening * DEEP + "1" + closing * DEEP


def changed_json(rng, value):
    """JSON with one value in it changed, left out, doubled or renamed."""
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return rng.choice(STRANGE)
    holder, key = rng.choice(places)
    how = rng.randrange(5)
    if how == 0 and isinstance(holder, dict):
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x", key + " ", key.upper(), "format"))] = holder.pop(key)
    elif how == 2 and isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[key] = rng.choice((*STRANGE, [holder[key]], str(holder[key]), {"a": holder[key]}))
    return value


def _places(value):
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for at, part in enumerate(value):
            yield value, at
            yield from _places(part)


def changed_bytes(rng, data):
    """Bytes of which some are flipped, cut off, doubled, swapped or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(7)
        if how == 0:
            del data[at:]
        elif how == 1:
            del data[at : at + rng.choice((1, 2, 8, 100))]
        elif how == 2:
            data[at:at] = data[at : at + rng.choice((1, 8, 100))]
        elif how == 3:
            data[at:at] = rng.choice(STRANGE_BYTES)
        elif how == 4:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8))))
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def changed_lines(rng, data):
    """A file of JSON a line, with something wrong in it."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    how = rng.randrange(8)
    if how == 0:
        return changed_bytes(rng, data)
    if how == 1:
        del lines[at]
    elif how == 2:
        lines.insert(at, rng.choice(lines))
    elif how == 3:
        lines[at] = deep(rng).encode()
    else:
        try:
            lines[at] = json.dumps(changed_json(rng, json.loads(lines[at]))).encode()
        except ValueError:  # an empty line
            lines[at] = changed_bytes(rng, lines[at])
    return b"\n".join(lines)


def changed_document(rng, data):
    """A file of one JSON value."""
    how = rng.randrange(4)
    if how == 0:
        return changed_bytes(rng, data)
    if how == 1 and rng.random() < 0.1:
        return deep(rng).encode()
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        value = changed_json(rng, value)
    return json.dumps(value).encode()


def changed_safetensors(rng, data):
    """A safetensors file: its header's JSON, metadata that are JSON themselves, or bytes anywhere."""
    if rng.random() < 0.3:
        return changed_bytes(rng, data)
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.2:  # numbers alone
        flipped = bytearray(rest)
        flipped[rng.randrange(len(rest))] ^= 1 << rng.randrange(8)
        return data[: 8 + size] + bytes(flipped)
    inner = [key for key, text in header.get("__metadata__", {}).items() if text[:1] in ("{", "[")]
    if inner and rng.random() < 0.6:
        key = rng.choice(inner)
        changed = changed_json(rng, json.loads(header["__metadata__"][key]))
        header["__metadata__"][key] = json.dumps(changed)
    elif rng.random() < 0.5:
        names = [name for name in header if name != "__metadata__"]
        one, other = rng.choice(names), rng.choice(names)
        how = rng.randrange(4)
        if how == 0:
            header[one], header[other] = header[other], header[one]
        elif how == 1:
            header[one]["dtype"] = rng.choice(("F64", "F32", "I64", "U16", "BOOL", "BF16"))
        elif how == 2:
            header[one]["shape"] = [*header[one]["shape"], 1] if rng.random() < 0.5 else header[one]["shape"][::-1]
        else:
            del header[one]
    else:
        header = changed_json(rng, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) + (rng.choice((-1, 1, 1 << 40)) if rng.random() < 0.03 else 0)) + text + rest
