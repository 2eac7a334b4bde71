"""The XLA handler around the product's tiles, in LLVM's intermediate representation.

XLA calls it through its typed foreign function interface (xla/ffi/api/c_api.h, version 0). The offsets below are those
of that header's structures on a 64-bit machine; a test compares them with the header in jaxlib.

The threads are XLA's own. The handler asks XLA's thread pool for help and works itself until no piece is left. It waits
only for pieces that another thread has begun, so it ends whatever the pool does. The last thread frees the shared
memory.
"""

from __future__ import annotations

PIECE_BYTES = 48 * 1024
"""Bytes of weights that a thread processes at once."""
MOST_THREADS = 64
"""Most threads that share one call's work."""
PIECE_OUTPUTS = 12
"""The outputs of a piece are a multiple of this, so that tiles of 2, 3 and 4 fit."""
ALONE_BYTES = 96 * 1024
"""Products that read at most this many bytes run on one thread: a second one would start too late."""

# xla/ffi/api/c_api.h: XLA_FFI_CallFrame, XLA_FFI_Args, XLA_FFI_Rets
FRAME = {"extension": 8, "api": 16, "context": 24, "arguments": 72, "results_count": 96, "results": 112}
# XLA_FFI_Buffer
BUFFER = {"dtype": 16, "data": 24, "dims": 40}
# XLA_FFI_Api
API = {"destroy_error": 64, "schedule": 136, "threads": 144}
S8 = 2  # XLA_FFI_DataType_S8


def handler(pause: str) -> str:
    """The handler's text; for `pause` see `assembly.Shape`."""
    return "\n".join([_WORK, _SHARE, _METADATA, _BODY.replace("{pause}", pause)])


def _field(name: str, base: str, offset: int, kind: str = "ptr") -> str:
    """Code that loads one field of a structure."""
    return f"  %{name}.at = getelementptr i8, ptr {base}, i64 {offset}\n  %{name} = load {kind}, ptr %{name}.at"


_WORK = """
; one of the products of a call: weights, scale, result, outputs, outputs a piece, the first piece and the one after the
; last, whether weights are 8-bit
%product = type { ptr, ptr, ptr, i64, i64, i64, i64, i1 }
; what the threads of one call share: threads that came, pieces done, threads that hold it, pieces, threads that may
; come, what each of them has left, x, rows, depth, products
%work = type { i64, i64, i64, i64, i64, ptr, ptr, i64, i64, [0 x %product] }
; the pieces that a thread begins with: the next one, and the end. It is a cache line: no other thread writes to it
%range = type { i64, i64, [6 x i64] }
"""

_PRODUCT = {"w": "ptr", "scale": "ptr", "out": "ptr", "outputs": "i64", "each": "i64", "from": "i64", "to": "i64"}
_PRODUCT |= {"s8": "i1"}
_SHARED = {"arrived": "i64", "finished": "i64", "holders": "i64", "pieces": "i64", "threads": "i64", "ranges": "ptr"}
_SHARED |= {"x": "ptr", "rows": "i64", "depth": "i64", "products": ""}
_PRODUCT_BYTES, _SHARED_BYTES, _RANGE_BYTES = 64, 72, 64


def _at(name: str, prefix: str = "") -> str:
    """Code for the address of a field that threads share."""
    return f"  %{prefix}{name}.at = getelementptr %work, ptr %work, i32 0, i32 {list(_SHARED).index(name)}"


def _loaded(*names: str) -> str:
    return "\n".join(f"{_at(name)}\n  %{name} = load {_SHARED[name]}, ptr %{name}.at" for name in names)


def _stored() -> str:
    """Code that initialises the shared fields: no piece is begun, and one thread holds the memory.

    Products and ranges are written elsewhere.
    """
    values = {"arrived": "0", "finished": "0", "holders": "1"}
    return "\n".join(
        f"{_at(name, 'work.')}\n  store {kind} {values.get(name, f'%{name}')}, ptr %work.{name}.at"
        for name, kind in _SHARED.items()
        if kind
    )


def _of_product(name: str, prefix: str = "") -> str:
    """Code for the address of a field of product number ``%product``."""
    return (
        f"  %{prefix}{name}.at = getelementptr %work, ptr %work, i32 0, i32 {list(_SHARED).index('products')}, "
        f"i64 %product, i32 {list(_PRODUCT).index(name)}"
    )


def _product_loaded(*names: str) -> str:
    return "\n".join(f"{_of_product(name)}\n  %{name} = load {_PRODUCT[name]}, ptr %{name}.at" for name in names)


def _product_stored() -> str:
    return "\n".join(
        f"{_of_product(name, 'product.')}\n  store {kind} %{name}, ptr %product.{name}.at"
        for name, kind in _PRODUCT.items()
    )


_SHARE = f"""
; works on the pieces of a range of its own, then on what other threads have left: a thread reads on in memory that way,
; which is up to half again as fast as pieces of all threads in turn
define internal void @share(ptr %work) {{
entry:
{_at("finished")}
{_at("arrived")}
{_loaded("threads", "ranges", "x", "rows", "depth")}
  %ticket = atomicrmw add ptr %arrived.at, i64 1 seq_cst
  br label %turn
turn:
  %turns = phi i64 [ 0, %entry ], [ %turns.next, %empty ]
  %over = icmp uge i64 %turns, %threads
  br i1 %over, label %done, label %begin
begin:
  %some = add i64 %ticket, %turns
  %whose = urem i64 %some, %threads
  %range.next = getelementptr %range, ptr %ranges, i64 %whose, i32 0
  %range.end.at = getelementptr %range, ptr %ranges, i64 %whose, i32 1
  %range.end = load i64, ptr %range.end.at
  br label %take
empty:
  %turns.next = add i64 %turns, 1
  br label %turn
take:
  %piece = atomicrmw add ptr %range.next, i64 1 seq_cst
  %is = icmp ult i64 %piece, %range.end
  br i1 %is, label %find, label %empty
find:
  %product = phi i64 [ 0, %take ], [ %product.next, %find ]
{_product_loaded("to")}
  %product.next = add i64 %product, 1
  %later = icmp uge i64 %piece, %to
  br i1 %later, label %find, label %run
run:
{_product_loaded("w", "scale", "out", "outputs", "each", "from", "s8")}
  %number = sub i64 %piece, %from
  %first = mul i64 %number, %each
  %end = add i64 %first, %each
  %last = call i64 @llvm.umin.i64(i64 %end, i64 %outputs)
  br i1 %s8, label %run.s8, label %run.f32
run.s8:
  call void @piece_s8(ptr %x, ptr %w, ptr %scale, ptr %out, i64 %rows, i64 %depth, i64 %outputs, i64 %first, i64 %last)
  br label %count
run.f32:
  call void @piece_f32(ptr %x, ptr %w, ptr %scale, ptr %out, i64 %rows, i64 %depth, i64 %outputs, i64 %first, i64 %last)
  br label %count
count:
  %before = atomicrmw add ptr %finished.at, i64 1 seq_cst
  br label %take
done:
  ret void
}}

; gives up a hold of the work; the last one frees it
define internal void @release(ptr %work) {{
{_at("holders")}
  %held = atomicrmw sub ptr %holders.at, i64 1 seq_cst
  %last = icmp eq i64 %held, 1
  br i1 %last, label %free, label %done
free:
  call void @free(ptr %work)
  br label %done
done:
  ret void
}}

; what XLA's threads run
define internal void @help(ptr %work) {{
  call void @share(ptr %work)
  call void @release(ptr %work)
  ret void
}}
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)
"""

_METADATA = """
; answers the question that XLA asks when a handler is registered: the version of the interface
define internal i1 @answered(ptr %extension) {
entry:
  %none = icmp eq ptr %extension, null
  br i1 %none, label %no, label %look
look:
  %type.at = getelementptr i8, ptr %extension, i64 8
  %type = load i32, ptr %type.at
  %asked = icmp eq i32 %type, 1
  br i1 %asked, label %yes, label %no
yes:
  %metadata.at = getelementptr i8, ptr %extension, i64 24
  %metadata = load ptr, ptr %metadata.at
  %major = getelementptr i8, ptr %metadata, i64 24
  store i32 0, ptr %major
  %minor = getelementptr i8, ptr %metadata, i64 28
  store i32 1, ptr %minor
  ret i1 true
no:
  ret i1 false
}
"""

_BODY = f"""
; arguments x [R, K] float32, then for each product w [N, K] float32 or int8 and scale [N] float32 (for float32 weights
; any float32 array); results [R, N] float32
define ptr @weight_product(ptr %frame) {{
entry:
{_field("extension", "%frame", FRAME["extension"])}
  %answered = call i1 @answered(ptr %extension)
  br i1 %answered, label %return, label %execute
execute:
{_field("api", "%frame", FRAME["api"])}
{_field("context", "%frame", FRAME["context"])}
{_field("arguments", "%frame", FRAME["arguments"])}
{_field("count", "%frame", FRAME["results_count"], "i64")}
{_field("results", "%frame", FRAME["results"])}
{_field("x.buffer", "%arguments", 0)}
{_field("x", "%x.buffer", BUFFER["data"])}
{_field("x.dims", "%x.buffer", BUFFER["dims"])}
{_field("rows", "%x.dims", 0, "i64")}
{_field("depth", "%x.dims", 8, "i64")}
  %products.bytes = mul i64 %count, {_PRODUCT_BYTES}
  %ranges.start = add i64 %products.bytes, {_SHARED_BYTES}
  %work.bytes = add i64 %ranges.start, {_RANGE_BYTES * MOST_THREADS}
  %work = call ptr @malloc(i64 %work.bytes)
  %ranges = getelementptr i8, ptr %work, i64 %ranges.start
  br label %product.begin
product.begin:
  %product = phi i64 [ 0, %execute ], [ %product.next, %product.end ]
  %from = phi i64 [ 0, %execute ], [ %to, %product.end ]
  %bytes.before = phi i64 [ 0, %execute ], [ %bytes, %product.end ]
  %complete.products = icmp uge i64 %product, %count
  br i1 %complete.products, label %divided, label %product.end
product.end:
  %product.next = add i64 %product, 1
  %w.number = mul i64 %product, 2
  %w.argument = add i64 %w.number, 1
  %scale.argument = add i64 %w.number, 2
  %w.buffer.at = getelementptr ptr, ptr %arguments, i64 %w.argument
  %w.buffer = load ptr, ptr %w.buffer.at
  %scale.buffer.at = getelementptr ptr, ptr %arguments, i64 %scale.argument
  %scale.buffer = load ptr, ptr %scale.buffer.at
  %out.buffer.at = getelementptr ptr, ptr %results, i64 %product
  %out.buffer = load ptr, ptr %out.buffer.at
{_field("w", "%w.buffer", BUFFER["data"])}
{_field("scale", "%scale.buffer", BUFFER["data"])}
{_field("out", "%out.buffer", BUFFER["data"])}
{_field("w.dtype", "%w.buffer", BUFFER["dtype"], "i32")}
{_field("w.dims", "%w.buffer", BUFFER["dims"])}
{_field("outputs", "%w.dims", 0, "i64")}
  %s8 = icmp eq i32 %w.dtype, {S8}
  %size = select i1 %s8, i64 1, i64 4
  %row.bytes = mul i64 %depth, %size
  %matrix.bytes = mul i64 %row.bytes, %outputs
  %bytes = add i64 %bytes.before, %matrix.bytes
  ; how many outputs a piece has, whole tiles if it can be, and how many pieces there are
  %row.some = call i64 @llvm.umax.i64(i64 %row.bytes, i64 1)
  %each.raw = udiv i64 {PIECE_BYTES}, %row.some
  %each.more = add i64 %each.raw, {PIECE_OUTPUTS}
  %each.tiles = udiv i64 %each.more, {PIECE_OUTPUTS}
  %each = mul i64 %each.tiles, {PIECE_OUTPUTS}
  %each.less = sub i64 %each, 1
  %padded = add i64 %outputs, %each.less
  %pieces.own = udiv i64 %padded, %each
  %to = add i64 %from, %pieces.own
{_product_stored()}
  br label %product.begin
divided:
  %pieces = add i64 %from, 0
{_field("threads.function", "%api", API["threads"])}
{_field("destroy", "%api", API["destroy_error"])}
{_field("schedule", "%api", API["schedule"])}
  %small = icmp ule i64 %bytes.before, {ALONE_BYTES}
  br i1 %small, label %share.out, label %ask
ask:
  ; XLA_FFI_ThreadPool_NumThreads_Args
  %thread.count = alloca i64
  store i64 1, ptr %thread.count
  %question = alloca [4 x i64]
  store i64 32, ptr %question
  %question.extension = getelementptr i64, ptr %question, i64 1
  store ptr null, ptr %question.extension
  %question.context = getelementptr i64, ptr %question, i64 2
  store ptr %context, ptr %question.context
  %question.count = getelementptr i64, ptr %question, i64 3
  store ptr %thread.count, ptr %question.count
  %no.count = call ptr %threads.function(ptr %question)
  %refused = icmp ne ptr %no.count, null
  br i1 %refused, label %forget, label %counted
forget:
  call void @destroy_error(ptr %destroy, ptr %no.count)
  br label %share.out
counted:
  %counted.raw = load i64, ptr %thread.count
  %counted.some = call i64 @llvm.umax.i64(i64 %counted.raw, i64 1)
  %counted.most = call i64 @llvm.umin.i64(i64 %counted.some, i64 {MOST_THREADS})
  %counted.useful = call i64 @llvm.umin.i64(i64 %counted.most, i64 %pieces)
  br label %share.out
share.out:
  ; every thread that may come begins at a range of its own
  %threads = phi i64 [ 1, %divided ], [ 1, %forget ], [ %counted.useful, %counted ]
  br label %range.begin
range.begin:
  %number = phi i64 [ 0, %share.out ], [ %number.next, %range.make ]
  %ranges.made = icmp uge i64 %number, %threads
  br i1 %ranges.made, label %shared, label %range.make
range.make:
  %number.next = add i64 %number, 1
  %start.raw = mul i64 %number, %pieces
  %start = udiv i64 %start.raw, %threads
  %stop.raw = mul i64 %number.next, %pieces
  %stop = udiv i64 %stop.raw, %threads
  %start.at = getelementptr %range, ptr %ranges, i64 %number, i32 0
  store i64 %start, ptr %start.at
  %stop.at = getelementptr %range, ptr %ranges, i64 %number, i32 1
  store i64 %stop, ptr %stop.at
  br label %range.begin
shared:
  %helpers = sub i64 %threads, 1
{_stored()}
  ; XLA_FFI_ThreadPool_Schedule_Args
  %request = alloca [5 x i64]
  store i64 40, ptr %request
  %request.extension = getelementptr i64, ptr %request, i64 1
  store ptr null, ptr %request.extension
  %request.context = getelementptr i64, ptr %request, i64 2
  store ptr %context, ptr %request.context
  %request.task = getelementptr i64, ptr %request, i64 3
  store ptr @help, ptr %request.task
  %request.data = getelementptr i64, ptr %request, i64 4
  store ptr %work, ptr %request.data
  br label %invite
invite:
  %invited = phi i64 [ 0, %shared ], [ %invited.next, %invite.done ]
  %enough = icmp uge i64 %invited, %helpers
  br i1 %enough, label %together, label %invite.one
invite.one:
  %held = atomicrmw add ptr %work.holders.at, i64 1 seq_cst
  %failed = call ptr %schedule(ptr %request)
  %came = icmp eq ptr %failed, null
  br i1 %came, label %invite.done, label %declined
declined:
  call void @destroy_error(ptr %destroy, ptr %failed)
  call void @release(ptr %work)
  br label %together
invite.done:
  %invited.next = add i64 %invited, 1
  br label %invite
together:
  call void @share(ptr %work)
  br label %wait
wait:
  ; another thread is still at a piece that it has begun: that takes microseconds
  %turns = phi i64 [ 0, %together ], [ %turns.next, %pause ], [ 0, %yield ]
  %ended = load atomic i64, ptr %work.finished.at seq_cst, align 8
  %complete = icmp uge i64 %ended, %pieces
  br i1 %complete, label %finish, label %patience
patience:
  %turns.next = add i64 %turns, 1
  %long = icmp ugt i64 %turns.next, 2000
  br i1 %long, label %yield, label %pause
pause:
  {{pause}}
  br label %wait
yield:
  %yielded = call i32 @sched_yield()
  br label %wait
finish:
  call void @release(ptr %work)
  br label %return
return:
  ret ptr null
}}

; XLA_FFI_Error_Destroy
define internal void @destroy_error(ptr %destroy, ptr %error) {{
  %arguments = alloca [3 x i64]
  store i64 24, ptr %arguments
  %extension = getelementptr i64, ptr %arguments, i64 1
  store ptr null, ptr %extension
  %which = getelementptr i64, ptr %arguments, i64 2
  store ptr %error, ptr %which
  call void %destroy(ptr %arguments)
  ret void
}}
"""
