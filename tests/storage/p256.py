"""ECDSA over P-256 by its definition (FIPS 186-5, SEC 1), to check signatures without the library that made them."""

from __future__ import annotations

import base64
import hashlib

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
Point = tuple[int, int] | None


def add(a: Point, b: Point) -> Point:
    if a is None or b is None:
        return a or b
    if a[0] == b[0] and (a[1] + b[1]) % P == 0:
        return None
    slope = (3 * a[0] ** 2 - 3) * pow(2 * a[1], -1, P) if a == b else (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope**2 - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def multiply(k: int, point: Point) -> Point:
    total: Point = None
    while k:
        total = add(total, point) if k & 1 else total
        point, k = add(point, point), k >> 1
    return total


def public_point(der_base64: str) -> tuple[int, int]:
    """Return the point of a public key: the last 64 bytes of its DER are its coordinates."""
    der = base64.b64decode(der_base64)
    x, y = int.from_bytes(der[-64:-32], "big"), int.from_bytes(der[-32:], "big")
    assert der[-65] == 4
    assert (y * y - x**3 + 3 * x - B) % P == 0
    return x, y


def integers(der: bytes) -> tuple[int, int]:
    """Return r and s of a signature: a sequence of two integers."""
    r_end = 4 + der[3]
    s_end = r_end + 2 + der[r_end + 1]
    assert (der[0], der[2], der[r_end], s_end) == (0x30, 2, 2, len(der))
    return int.from_bytes(der[4:r_end], "big"), int.from_bytes(der[r_end + 2 : s_end], "big")


def is_valid(public_key: str, signature: bytes, data: bytes) -> bool:
    r, s = integers(signature)
    digest = int.from_bytes(hashlib.sha256(data).digest(), "big")
    inverse = pow(s, -1, N)
    point = add(multiply(digest * inverse % N, G), multiply(r * inverse % N, public_point(public_key)))
    return point is not None and point[0] % N == r
