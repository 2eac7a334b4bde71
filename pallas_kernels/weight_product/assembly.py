"""The product's kernel in LLVM's intermediate representation, generated for one kind of CPU.

A tile multiplies some rows of x by some rows of weights. It keeps a vector of partial sums for each pair; lane l adds
the products ``l, l + lanes, l + 2 lanes...``. The order of additions does not depend on the tile, so a row's bits do
not depend on the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.weight_product.handler import handler

WEIGHTS = {"f32": ("float", 4), "s8": ("i8", 1)}
"""LLVM type and number of bytes of a stored weight."""


class Tile(NamedTuple):
    """Rows of x and outputs (rows of weights) that a tile processes at once."""

    rows: int
    outputs: int


class Shape(NamedTuple):
    """Tile sizes that fit into a CPU's registers.

    Attributes:
      lanes: float32 numbers in a vector.
      tiles: sorted by descending rows; the last has one row.
      pause: the instruction with which a waiting thread yields the core's resources; empty if there is none.
    """

    lanes: int
    tiles: tuple[Tile, ...]
    pause: str


def module(shape: Shape) -> str:
    """The text of the whole program."""
    singles = {Tile(tile.rows, 1) for tile in shape.tiles}
    tiles = [_tile(shape, tile, weights) for weights in WEIGHTS for tile in sorted({*shape.tiles, *singles})]
    pieces = [_piece(weights, shape.tiles) for weights in WEIGHTS]
    return "\n".join([_declarations(shape.lanes), *tiles, *pieces, handler(shape.pause)])


def _declarations(lanes: int) -> str:
    vector = f"<{lanes} x float>"
    return f"""
declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})
declare {vector} @llvm.masked.load.v{lanes}f32.p0(ptr, i32, <{lanes} x i1>, {vector})
declare <{lanes} x i8> @llvm.masked.load.v{lanes}i8.p0(ptr, i32, <{lanes} x i1>, <{lanes} x i8>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()
"""


def _tile(shape: Shape, tile: Tile, weights: str) -> str:
    """Code for outputs `first` to `last`, a multiple of the tile's outputs.

    It computes ``out[r, n] = scale[n] * sum_k x[r, k] w[n, k]``.
    """
    lanes = shape.lanes
    vector, (stored, _) = f"<{lanes} x float>", WEIGHTS[weights]
    cells = [(r, b) for r in range(tile.rows) for b in range(tile.outputs)]
    sums = [f"{r}.{b}" for r, b in cells]
    lines = [
        f"define internal void @tile_{weights}_{tile.rows}_{tile.outputs}(ptr noalias %x, ptr noalias %w, "
        "ptr noalias %scale, ptr noalias %out, i64 %depth, i64 %outputs, i64 %first, i64 %last) {",
        "entry:",
        f"  %whole = urem i64 %depth, {lanes}",
        "  %end = sub i64 %depth, %whole",
        "  br label %output",
        "output:",
        "  %n = phi i64 [ %first, %entry ], [ %next, %written ]",
    ]
    for b in range(tile.outputs):
        lines += [
            f"  %n{b} = add i64 %n, {b}",
            f"  %offset{b} = mul i64 %n{b}, %depth",
            f"  %row{b} = getelementptr {stored}, ptr %w, i64 %offset{b}",
        ]
    lines += [
        f"  %n.following = add i64 %n, {tile.outputs}",
        "  %offset.following = mul i64 %n.following, %depth",
        f"  %following = getelementptr {stored}, ptr %w, i64 %offset.following",
        "  %some = icmp ugt i64 %end, 0",
        "  br i1 %some, label %inner, label %rest",
        # Main loop over whole steps of the depth.
        "inner:",
        "  %k = phi i64 [ 0, %output ], [ %k.next, %inner ]",
    ]
    lines += [f"  %s{s} = phi {vector} [ zeroinitializer, %output ], [ %t{s}, %inner ]" for s in sums]
    lines += _prefetch(lanes, tile, weights)
    lines += _multiply_add(lanes, tile, weights, "%k", None, "a", "s", "t")
    lines += [
        f"  %k.next = add i64 %k, {lanes}",
        "  %more = icmp ult i64 %k.next, %end",
        "  br i1 %more, label %inner, label %rest",
        # The rest of the depth, in a masked vector whose other lanes are zero.
        "rest:",
    ]
    lines += [f"  %u{s} = phi {vector} [ zeroinitializer, %output ], [ %t{s}, %inner ]" for s in sums]
    lines += [
        "  %exact = icmp eq i64 %whole, 0",
        "  br i1 %exact, label %written, label %tail",
        "tail:",
        f"  %left0 = insertelement <{lanes} x i64> poison, i64 %whole, i64 0",
        f"  %left = shufflevector <{lanes} x i64> %left0, <{lanes} x i64> poison, <{lanes} x i32> zeroinitializer",
    ]
    numbers = ", ".join(f"i64 {lane}" for lane in range(lanes))
    lines += [f"  %mask = icmp ult <{lanes} x i64> <{numbers}>, %left"]
    lines += _multiply_add(lanes, tile, weights, "%end", "%mask", "z", "u", "q")
    lines += ["  br label %written", "written:"]
    lines += [f"  %f{s} = phi {vector} [ %u{s}, %rest ], [ %q{s}, %tail ]" for s in sums]
    for b in range(tile.outputs):
        if weights == "s8":
            lines += [
                f"  %scale{b} = getelementptr float, ptr %scale, i64 %n{b}",
                f"  %factor{b} = load float, ptr %scale{b}",
            ]
    for r, b in cells:
        cell = f"{r}.{b}"
        lines += _tree(lanes, cell, f"%f{cell}")
        total = f"%total{cell}"
        if weights == "s8":
            lines += [f"  %scaled{cell} = fmul float {total}, %factor{b}"]
            total = f"%scaled{cell}"
        lines += [
            f"  %at{cell}.row = mul i64 %outputs, {r}",
            f"  %at{cell}.n = add i64 %at{cell}.row, %n{b}",
            f"  %at{cell} = getelementptr float, ptr %out, i64 %at{cell}.n",
            f"  store float {total}, ptr %at{cell}",
        ]
    lines += [
        f"  %next = add i64 %n, {tile.outputs}",
        "  %again = icmp ult i64 %next, %last",
        "  br i1 %again, label %output, label %done",
        "done:",
        "  ret void",
        "}",
    ]
    return "\n".join(lines)


LINE = 64
"""Bytes in a cache line."""


def _prefetch(lanes: int, tile: Tile, weights: str) -> list[str]:
    """Prefetches the next tile's weights, in memory order.

    Reading several rows in parallel makes more streams than the hardware prefetcher follows. Without this, two rows are
    read at half the speed of one.
    """
    stored, size = WEIGHTS[weights]
    if tile.outputs == 1:
        return []
    step = lanes * tile.outputs
    lines = [f"  %ahead = mul i64 %k, {tile.outputs}"]
    for i in range(-(-step * size // LINE)):
        lines += [
            f"  %ahead{i} = add i64 %ahead, {i * LINE // size}",
            f"  %line{i} = getelementptr {stored}, ptr %following, i64 %ahead{i}",
            f"  call void @llvm.prefetch.p0(ptr %line{i}, i32 0, i32 2, i32 1)",
        ]
    return lines


def _multiply_add(
    lanes: int, tile: Tile, weights: str, k: str, mask: str | None, prefix: str, old: str, new: str
) -> list[str]:
    """Code that adds the products of one vector along the depth to every pair's partial sums."""
    lines = []
    vector = f"<{lanes} x float>"
    for b in range(tile.outputs):
        lines += _weights(lanes, weights, f"%{prefix}w{b}", f"%row{b}", k, mask)
    for r in range(tile.rows):
        lines += _row(lanes, r, f"%{prefix}x{r}", k, mask)
        lines += [
            f"  %{new}{r}.{b} = call {vector} @llvm.fma.v{lanes}f32({vector} %{prefix}x{r}, "
            f"{vector} %{prefix}w{b}, {vector} %{old}{r}.{b})"
            for b in range(tile.outputs)
        ]
    return lines


def _weights(lanes: int, weights: str, name: str, row: str, k: str, mask: str | None) -> list[str]:
    """Code that loads a vector of weights as float32."""
    stored, _ = WEIGHTS[weights]
    loaded = name if weights == "f32" else f"{name}.i8"
    lines = [
        f"  {name}.p = getelementptr {stored}, ptr {row}, i64 {k}",
        _load(lanes, loaded, f"{name}.p", stored, mask),
    ]
    if weights == "s8":
        lines += [
            f"  {name}.i32 = sext <{lanes} x i8> {name}.i8 to <{lanes} x i32>",
            f"  {name} = sitofp <{lanes} x i32> {name}.i32 to <{lanes} x float>",
        ]
    return lines


def _row(lanes: int, r: int, name: str, k: str, mask: str | None) -> list[str]:
    """Code that loads a vector of row `r` of x."""
    return [
        f"  {name}.r = mul i64 %depth, {r}",
        f"  {name}.k = add i64 {name}.r, {k}",
        f"  {name}.p = getelementptr float, ptr %x, i64 {name}.k",
        _load(lanes, name, f"{name}.p", "float", mask),
    ]


def _load(lanes: int, name: str, pointer: str, kind: str, mask: str | None) -> str:
    vector, size = f"<{lanes} x {kind}>", 4 if kind == "float" else 1
    if mask is None:
        return f"  {name} = load {vector}, ptr {pointer}, align {size}"
    suffix = "f32" if kind == "float" else "i8"
    return (
        f"  {name} = call {vector} @llvm.masked.load.v{lanes}{suffix}.p0("
        f"ptr {pointer}, i32 {size}, <{lanes} x i1> {mask}, {vector} zeroinitializer)"
    )


def _tree(lanes: int, cell: str, source: str) -> list[str]:
    """Code that adds a vector's lanes: one half to the other, always in this order."""
    lines = []
    while lanes > 1:
        half = lanes // 2
        vector, narrow = f"<{lanes} x float>", f"<{half} x float>"
        for part, start in (("low", 0), ("high", half)):
            picked = ", ".join(f"i32 {i}" for i in range(start, start + half))
            lines += [
                f"  %tree{cell}.{lanes}.{part} = shufflevector {vector} {source}, {vector} poison, "
                f"<{half} x i32> <{picked}>"
            ]
        lines += [f"  %tree{cell}.{half} = fadd {narrow} %tree{cell}.{lanes}.low, %tree{cell}.{lanes}.high"]
        source, lanes = f"%tree{cell}.{half}", half
    return [*lines, f"  %total{cell} = extractelement <1 x float> {source}, i64 0"]


def _piece(weights: str, tiles: tuple[Tile, ...]) -> str:
    """Code for outputs `first` to `last` of any number of rows, in blocks of the most rows that fit.

    The weights of a piece stay in the core's cache, from which a second block of rows reads them.
    """
    lines = [
        f"define internal void @piece_{weights}(ptr %x, ptr %w, ptr %scale, ptr %out, i64 %rows, i64 %depth, "
        "i64 %outputs, i64 %first, i64 %last) {",
        "entry:",
        "  %count = sub i64 %last, %first",
        "  br label %choose",
        "choose:",
        "  %r = phi i64 [ 0, %entry ]" + "".join(f", [ %r{t.rows}, %taken{t.rows} ]" for t in tiles),
        "  %left = sub i64 %rows, %r",
        "  %x.row = mul i64 %r, %depth",
        "  %x.at = getelementptr float, ptr %x, i64 %x.row",
        "  %out.row = mul i64 %r, %outputs",
        "  %out.at = getelementptr float, ptr %out, i64 %out.row",
        f"  br label %ask{tiles[0].rows}",
    ]

    def call(tile: Tile, first: str, last: str) -> str:
        return (
            f"  call void @tile_{weights}_{tile.rows}_{tile.outputs}(ptr %x.at, ptr %w, ptr %scale, ptr %out.at, "
            f"i64 %depth, i64 %outputs, i64 {first}, i64 {last})"
        )

    for tile, following in zip(tiles, [*tiles[1:], None], strict=True):
        n, other = tile.rows, "done" if following is None else f"ask{following.rows}"
        lines += [
            f"ask{n}:",
            f"  %fits{n} = icmp uge i64 %left, {n}",
            f"  br i1 %fits{n}, label %take{n}, label %{other}",
            f"take{n}:",
            f"  %odd{n} = urem i64 %count, {tile.outputs}",
            f"  %even{n} = sub i64 %last, %odd{n}",
            f"  %r{n} = add i64 %r, {n}",
            f"  %any{n} = icmp ult i64 %first, %even{n}",
            f"  br i1 %any{n}, label %wide{n}, label %rest{n}",
            f"wide{n}:",
            call(tile, "%first", f"%even{n}"),
            f"  br label %rest{n}",
            f"rest{n}:",
            f"  %some{n} = icmp ult i64 %even{n}, %last",
            f"  br i1 %some{n}, label %single{n}, label %taken{n}",
            f"single{n}:",
            call(Tile(n, 1), f"%even{n}", "%last"),
            f"  br label %taken{n}",
            f"taken{n}:",
            "  br label %choose",
        ]
    return "\n".join([*lines, "done:", "  ret void", "}"])
