"""Arrangements of heads in the outputs of attention's linear maps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from convert.probe.trace import Linear, Trace

Roles = tuple[str, ...]
"""Roles in each linear map, in order: ("q", "k", "v"), ("qkv",), ("q", "vk")..."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of `width` channels that begin at `starts` among a linear map's outputs."""

    linear: Linear
    starts: tuple[int, ...]
    width: int

    @property
    def output(self) -> np.ndarray:
        """[T, heads, width]."""
        return np.stack([self.linear.output[:, s : s + self.width] for s in self.starts], axis=1)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Arrangement of queries, keys and values in the linear maps.

    Attributes:
      roles: roles in each linear map.
      blocks: number of repeated blocks in fused projections; each has ``heads / blocks`` heads of each role.
      heads, kv_heads, width: sizes.
    """

    roles: Roles
    blocks: int
    heads: int
    kv_heads: int
    width: int

    def split_heads(self, linears: Sequence[Linear]) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values."""
        found = {}
        for linear, map_roles in zip(linears, self.roles, strict=True):
            counts = [self._count(role) // self.blocks for role in map_roles]
            for i, role in enumerate(map_roles):
                found[role] = Heads(linear, self._starts(sum(counts), sum(counts[:i]), counts[i]), self.width)
        return found["q"], found["k"], found["v"]

    def _count(self, role: str) -> int:
        return self.heads if role == "q" else self.kv_heads

    def _starts(self, block: int, first: int, count: int) -> tuple[int, ...]:
        return tuple(self.width * (b * block + first + i) for b in range(self.blocks) for i in range(count))


def arrangements(linears: Sequence[Linear], heads: int, width: int) -> Iterator[Arrangement]:
    """Arrangements for a number of query heads in linear maps with a common input, plausible ones first."""
    sizes = [linear.output.shape[1] for linear in linears]
    for roles in sorted(_role_orders(len(linears)), key=lambda roles: _role_penalty(linears, roles)):
        kv_heads = _kv_heads(sizes, roles, heads, width)
        if kv_heads is None:
            continue
        fused = any(len(map_roles) > 1 for map_roles in roles)
        for blocks in _blocks(kv_heads) if fused else (1,):
            yield Arrangement(roles, blocks, heads, kv_heads, width)


def head_counts(trace: Trace, channels: int) -> list[int]:
    """Possible head counts for `channels`: the configuration's, then its other numbers, then all divisors."""
    named = [
        *trace.numbers_named("n_?head|num_.*heads|heads$"),
        *(channels / d for d in trace.numbers_named("head_dim|kv_channels")),
    ]
    likely = [*named, *trace.settings.values(), *(channels / d for d in (128, 64, 256, 96, 80, 32, 16))]
    divisors = list(range(1, min(channels, 256) + 1))
    return list(dict.fromkeys(int(n) for n in (*likely, *divisors) if 1 <= n <= channels / 2 and channels % n == 0))


def _role_orders(count: int) -> Iterable[Roles]:
    """Orders of queries, keys and values, cut into as many parts as there are linear maps."""
    if not 1 <= count <= 3:
        return
    for order in itertools.permutations("qkv"):
        for cuts in itertools.combinations((1, 2), count - 1):
            edges = (0, *cuts, 3)
            yield tuple("".join(order[a:b]) for a, b in itertools.pairwise(edges))


def _role_penalty(linears: Sequence[Linear], roles: Roles) -> int:
    """Penalty for roles that contradict the linear maps' names; 0 is the best."""
    penalty = 0
    for position, (linear, map_roles) in enumerate(zip(linears, roles, strict=True)):
        name = linear.name.rpartition(".")[2].lower()
        penalty += sum(2 * (role not in name) for role in map_roles) + abs(position - "qkv".index(map_roles[0]))
        penalty += map_roles not in "qkv"
    return penalty


def _kv_heads(sizes: Sequence[int], roles: Roles, heads: int, width: int) -> int | None:
    """Number of key-value heads, if the sizes allow exactly one number."""
    found = set()
    for size, map_roles in zip(sizes, roles, strict=True):
        count, rest = divmod(size, width)
        remaining = count - heads * ("q" in map_roles)
        kv_roles = len(map_roles.replace("q", ""))
        if (
            rest
            or remaining < 0
            or (not kv_roles and remaining)
            or (kv_roles and (remaining % kv_roles or not remaining))
        ):
            return None
        if kv_roles:
            found.add(remaining // kv_roles)
    kv_heads = found.pop() if len(found) == 1 else None
    return kv_heads if kv_heads and heads % kv_heads == 0 else None


def _blocks(kv_heads: int) -> list[int]:
    divisors = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    return [1, kv_heads, *divisors[1:-1]] if kv_heads > 1 else [1]


def repeat_heads(values: np.ndarray, heads: int) -> np.ndarray:
    """Repeats values [T, KV, hd] for each query head, [T, H, hd]."""
    return np.repeat(values, math.ceil(heads / values.shape[1]), axis=1)
