"""The XLA handler around the product's tiles, in LLVM's intermediate representation.

XLA calls it through its typed foreign function interface (xla/ffi/api/c_api.h, version 0). The offsets below are those
of that header's structures on a 64-bit machine; a test compares them with the header that jaxlib brings.

Threads are XLA's own: the handler asks its thread pool to help and works itself until no piece is left. It waits only
for pieces that another thread has begun, so it ends whatever the pool does. The last thread frees what they share.
"""

from __future__ import annotations

PIECE_BYTES = 48 * 1024
"""Bytes of weights that a thread takes at once."""
ALONE_BYTES = 96 * 1024
"""Products that read no more than this stay on one thread: another would come too late."""

# xla/ffi/api/c_api.h: XLA_FFI_CallFrame, XLA_FFI_Args, XLA_FFI_Rets
FRAME = {"extension": 8, "api": 16, "context": 24, "arguments": 72, "results": 112}
# XLA_FFI_Buffer
BUFFER = {"dtype": 16, "data": 24, "dims": 40}
# XLA_FFI_Api
API = {"destroy_error": 64, "schedule": 136, "threads": 144}
S8 = 2  # XLA_FFI_DataType_S8


def handler(pause: str) -> str:
    """The handler's text. `pause`: see `assembly.Shape`."""
    return "\n".join([_WORK, _SHARE, _METADATA, _BODY.replace("{pause}", pause)])


def _field(name: str, base: str, offset: int, kind: str = "ptr") -> str:
    """Loads one field of a structure."""
    return f"  %{name}.at = getelementptr i8, ptr {base}, i64 {offset}\n  %{name} = load {kind}, ptr %{name}.at"


_WORK = """
; what the threads of one product share: next piece, pieces done, threads that hold it, pieces, outputs a piece,
; x, w, scale, out, rows, depth, outputs, whether weights are 8-bit
%work = type { i64, i64, i64, i64, i64, ptr, ptr, ptr, ptr, i64, i64, i64, i1 }
"""

_FIELDS = ("next", "finished", "holders", "pieces", "each", "x", "w", "scale", "out", "rows", "depth", "outputs", "s8")
_KINDS = ("i64",) * 5 + ("ptr",) * 4 + ("i64",) * 3 + ("i1",)


def _at(name: str) -> str:
    return f"  %{name}.at = getelementptr %work, ptr %work, i32 0, i32 {_FIELDS.index(name)}"


def _loaded(*names: str) -> str:
    kinds = dict(zip(_FIELDS, _KINDS, strict=True))
    return "\n".join(f"{_at(name)}\n  %{name} = load {kinds[name]}, ptr %{name}.at" for name in names)


def _stored() -> str:
    """Fills in what the threads share: no piece is begun, and one thread holds it."""
    values = {"next": "0", "finished": "0", "holders": "1"}
    return "\n".join(
        f"  %work.{name} = getelementptr %work, ptr %work, i32 0, i32 {number}\n"
        f"  store {kind} {values.get(name, f'%{name}')}, ptr %work.{name}"
        for number, (name, kind) in enumerate(zip(_FIELDS, _KINDS, strict=True))
    )


_SHARE = f"""
; works on pieces until none is left
define internal void @share(ptr %work) {{
entry:
{_at("next")}
{_at("finished")}
{_loaded(*_FIELDS[3:])}
  br label %take
take:
  %piece = atomicrmw add ptr %next.at, i64 1 seq_cst
  %is = icmp ult i64 %piece, %pieces
  br i1 %is, label %run, label %done
run:
  %first = mul i64 %piece, %each
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
; arguments x [R, K] float32, w [N, K] float32 or int8, scale [N] float32 (any float32 array for float32 weights);
; result [R, N] float32
define ptr @weight_product(ptr %frame) {{
entry:
{_field("extension", "%frame", FRAME["extension"])}
  %answered = call i1 @answered(ptr %extension)
  br i1 %answered, label %return, label %execute
execute:
{_field("api", "%frame", FRAME["api"])}
{_field("context", "%frame", FRAME["context"])}
{_field("arguments", "%frame", FRAME["arguments"])}
{_field("results", "%frame", FRAME["results"])}
{_field("x.buffer", "%arguments", 0)}
{_field("w.buffer", "%arguments", 8)}
{_field("scale.buffer", "%arguments", 16)}
{_field("out.buffer", "%results", 0)}
{_field("x", "%x.buffer", BUFFER["data"])}
{_field("w", "%w.buffer", BUFFER["data"])}
{_field("scale", "%scale.buffer", BUFFER["data"])}
{_field("out", "%out.buffer", BUFFER["data"])}
{_field("w.dtype", "%w.buffer", BUFFER["dtype"], "i32")}
{_field("x.dims", "%x.buffer", BUFFER["dims"])}
{_field("w.dims", "%w.buffer", BUFFER["dims"])}
{_field("rows", "%x.dims", 0, "i64")}
{_field("depth", "%x.dims", 8, "i64")}
{_field("outputs", "%w.dims", 0, "i64")}
  %s8 = icmp eq i32 %w.dtype, {S8}
  %size = select i1 %s8, i64 1, i64 4
  %row.bytes = mul i64 %depth, %size
  %bytes = mul i64 %row.bytes, %outputs
  ; how many outputs a piece has, and how many pieces there are
  %row.some = call i64 @llvm.umax.i64(i64 %row.bytes, i64 1)
  %each.raw = udiv i64 {PIECE_BYTES}, %row.some
  %each = call i64 @llvm.umax.i64(i64 %each.raw, i64 1)
  %each.less = sub i64 %each, 1
  %padded = add i64 %outputs, %each.less
  %pieces = udiv i64 %padded, %each
  %work = call ptr @malloc(i64 128)
{_stored()}
  %small = icmp ule i64 %bytes, {ALONE_BYTES}
  br i1 %small, label %together, label %ask
ask:
  ; XLA_FFI_ThreadPool_NumThreads_Args
  %count = alloca i64
  store i64 1, ptr %count
  %question = alloca [4 x i64]
  store i64 32, ptr %question
  %question.extension = getelementptr i64, ptr %question, i64 1
  store ptr null, ptr %question.extension
  %question.context = getelementptr i64, ptr %question, i64 2
  store ptr %context, ptr %question.context
  %question.count = getelementptr i64, ptr %question, i64 3
  store ptr %count, ptr %question.count
{_field("threads.function", "%api", API["threads"])}
{_field("destroy", "%api", API["destroy_error"])}
{_field("schedule", "%api", API["schedule"])}
  %no.count = call ptr %threads.function(ptr %question)
  %refused = icmp ne ptr %no.count, null
  br i1 %refused, label %forget, label %counted
forget:
  call void @destroy_error(ptr %destroy, ptr %no.count)
  br label %together
counted:
  %threads = load i64, ptr %count
  %spare = sub i64 %threads, 1
  %pieces.less = sub i64 %pieces, 1
  %helpers = call i64 @llvm.umin.i64(i64 %spare, i64 %pieces.less)
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
  %invited = phi i64 [ 0, %counted ], [ %invited.next, %invite.done ]
  %enough = icmp uge i64 %invited, %helpers
  br i1 %enough, label %together, label %invite.one
invite.one:
  %held = atomicrmw add ptr %work.holders, i64 1 seq_cst
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
  %ended = load atomic i64, ptr %work.finished seq_cst, align 8
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
