"""The form of a message between two ranks: a header of fixed size, then a tensor with its strides and alignment.

::

    0                 512              512 + shift          nbytes
    | header, int64s  | (alignment)    | the tensor's       |
    |                 |                | elements           |

Sender and receiver align their buffers to `LINE_BYTES`, and the received tensor stands on the buffer itself. So it has
the strides of the tensor sent, and its address modulo the line: see `dtrp.tensors.layout`.

A tree of tensors is one message too, and so is a sparse tensor. After the header come, as JSON, the tree's form and how
each tensor lies (of a sparse one its indices and values); then the tensors, each from the beginning of a line. A tensor
arrives with the ``requires_grad`` that it was sent with.
"""

from __future__ import annotations

import ctypes
import io
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensors.layout import LINE_BYTES, Layout, aligned_room, parts_of, shift_of, sparse_of
from ..tensors.pytree import flatten, unflatten
from ..typing import Tree

HEADER_BYTES = LINE_BYTES
_MAGIC = 0x64747270_0004  # "dtrp", and the version of this layout
_MOST_DIMS = 24
_CPU = torch.device("cpu")
_MOST_FREE = 20  # buffers of one layout that are kept; there are seldom more than two under way
_MOST_LAYOUTS = 8  # layouts whose buffers are kept: full and partial mini-batches, and their parts
_MOST_EXPECTED = 2  # layouts that a receive buffer is ready for: the same tensor is aligned in one way or another
_COMPACT, _WANTS_GRADIENT = 1, 2  # flags of a tensor
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


class Kind(IntEnum):
    """What a message is."""

    TENSOR = 0
    NOTHING = 1  # no tensor: a gradient that does not exist
    OBJECT = 2  # a pickled object
    GROW = 3  # the next message needs a larger buffer
    END = 4  # the sender sends no more
    TREE = 5  # tensors and constants in tuples, lists and dicts

    @classmethod
    def for_value(cls, value: Tree | None) -> Kind:
        """The kind of message that carries a stage's output or gradient."""
        if value is None:
            return cls.NOTHING
        return cls.TENSOR if isinstance(value, Tensor) and value.layout is torch.strided else cls.TREE


_KINDS = tuple(Kind)  # by value: `Kind(value)` takes ten times as long


class Note(NamedTuple):
    """What a message says of its micro-batch.

    Args:
        microbatch: its number m, counted since the pipeline was made.
        minibatch: the number of its mini-batch, b(m).
        parts: the number of micro-batches in the mini-batch.
        samples: the number of samples in the micro-batch.
        total: the number of samples in the mini-batch. In a message of kind GROW: the bytes that the next message
            needs.
        checksum: of the mini-batch's targets as the first rank was given them; -1: it was given none.
        word: forward, what all ranks agree on in this mini-batch; backward, what a rank proposes. See
            `dtrp.comm.proposals`.
        added: whether the value is a pair: the output, and the sum of the terms that stages have added to the loss.
        weight, total_weight: what the micro-batch and its mini-batch count for, by ``loss_weight``; -1: not by that, or
            not known yet.
    """

    microbatch: int = -1
    minibatch: int = -1
    parts: int = 0
    samples: int = 0
    total: int = 0
    checksum: int = -1
    word: int = 0
    added: int = 0
    weight: float = -1.0
    total_weight: float = -1.0


_PREFIX = struct.Struct(f"<{len(Note._fields)}q2d")  # of every header: the magic number, the kind, the note
_TENSOR = struct.Struct("<5q")  # then, for a tensor: dtype, dimensions, span, shift, flags; its shape; its strides


class Message(NamedTuple):
    """A message as received.

    Args:
        kind: of the message.
        note: what it says of its micro-batch.
        tensor: the tensor that was sent; for TREE the tree; otherwise None.
    """

    kind: Kind
    note: Note
    tensor: Tree | None = None

    def object(self) -> Any:
        """The value that `object_tensor` has pickled."""
        assert isinstance(self.tensor, Tensor)
        return torch.load(io.BytesIO(memory_of(self.tensor)), map_location="cpu", weights_only=False)


class Header(NamedTuple):
    """The header of a message as received.

    Args:
        kind: of the message.
        note: what it says of its micro-batch.
        rest: the bytes that describe its tensor or tree.
    """

    kind: Kind
    note: Note
    rest: bytes


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, valid while the tensor lives (`Tensor.numpy` would need NumPy)."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def object_tensor(value: Any) -> Tensor:
    """A picklable value as bytes; tensors in it arrive on the CPU."""
    file = io.BytesIO()
    torch.save(value, file)
    return _byte_tensor(file.getbuffer())


def _byte_tensor(data: bytes | memoryview) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class _Format(NamedTuple):
    """What messages with tensors of one layout have in common.

    Args:
        layout: of the tensor in the message.
        dtype: of the tensor.
        nbytes: the size of the message.
        description: the bytes that describe the tensor in the header; see `_TENSOR`.
    """

    layout: Layout
    dtype: torch.dtype
    nbytes: int
    description: bytes

    @classmethod
    def for_tensor(cls, tensor: Tensor) -> _Format:
        if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES or tensor.dim() > _MOST_DIMS:
            raise TypeError(
                f"a stage's output has a {tensor.layout} tensor of {tensor.dtype} with {tensor.dim()} dimensions; ranks "
                f"exchange dense ones of the common dtypes with at most {_MOST_DIMS} dimensions"
            )
        # A tensor that is mostly holes, as a column of a larger one, is sent without them.
        wanted, sent = Layout.from_tensor(tensor, holes=True), Layout.from_tensor(tensor)
        nbytes = HEADER_BYTES + sent.shift + sent.span * tensor.element_size()
        flags = (wanted != sent) * _COMPACT + tensor.requires_grad * _WANTS_GRADIENT
        numbers = (_DTYPES.index(tensor.dtype), tensor.dim(), wanted.span, wanted.shift, flags)
        words = (*numbers, *wanted.shape, *wanted.strides)
        return cls(sent, tensor.dtype, nbytes, struct.pack(f"<{len(words)}q", *words))


@dataclass(eq=False, slots=True)
class Packed:
    """A message that is ready to be sent, but for its header.

    Args:
        buffer: the message, uint8, on the tensor's device.
        header: the bytes that go to its beginning.
        tensor: the tensor that stands on the buffer.
        free: the buffers of its layout that can be used again; this one joins them once it has been sent.
    """

    buffer: Tensor
    header: bytes
    tensor: Tensor | None = None
    free: list[Packed] | None = None
    _memory: memoryview | None = None  # of the buffer, once it has been looked up

    def write_header(self) -> None:
        if self._memory is None and self.buffer.device.type == "cpu":
            self._memory = memory_of(self.buffer)
        if self._memory is not None:
            self._memory[: len(self.header)] = self.header
        else:
            self.buffer[: len(self.header)].copy_(_byte_tensor(self.header))

    def release(self) -> None:
        """The message has been sent; its buffer may hold the next message of its layout."""
        if self.free is not None and len(self.free) < _MOST_FREE:
            self.free.append(self)


class Packer:
    """Makes messages.

    Args:
        reuses: whether buffers that have been released are used again, for messages of the same layout.
    """

    def __init__(self, *, reuses: bool) -> None:
        self._reuses = reuses
        self._formats: dict[Any, tuple[_Format, list[Packed]]] = {}

    def pack(self, kind: Kind, note: Note, value: Tree | None = None) -> Packed:
        """A message whose header is not written yet.

        Args:
            kind: of the message.
            note: what it says of its micro-batch.
            value: a tensor; for TREE a tree; None for other kinds.

        Raises:
            TypeError: a tensor that no message can carry.
        """
        if kind is Kind.TREE:
            return _pack_tree(note, value)
        header = _PREFIX.pack(_MAGIC, kind, *note)
        if value is None:
            return Packed(aligned_room(HEADER_BYTES, _CPU), header)
        form, free = self._format(value)
        packed = free.pop() if free else _new_packed(form, value.device, free)
        packed.header = header + form.description
        assert packed.tensor is not None
        form.layout.fill(packed.tensor, value.detach())
        return packed

    def _format(self, tensor: Tensor) -> tuple[_Format, list[Packed]]:
        """The format of a tensor's message, and the buffers that can be used again."""
        if not self._reuses or tensor.layout is not torch.strided:
            return _Format.for_tensor(tensor), []
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, shift_of(tensor), tensor.requires_grad)
        known = self._formats.get(key)
        if known is None:
            if len(self._formats) == _MOST_LAYOUTS:
                self._formats.clear()
            known = self._formats[key] = (_Format.for_tensor(tensor), [])
        return known


def _new_packed(form: _Format, device: torch.device, free: list[Packed]) -> Packed:
    # The buffer outlives the call, so it is no inference tensor, whatever the caller's mode.
    with torch.inference_mode(False):
        room = aligned_room(form.nbytes, device)
        return Packed(room, b"", form.layout.over(room, form.dtype, HEADER_BYTES), free)


def _pack_tree(note: Note, value: Tree) -> Packed:
    tensors, form = flatten(value)
    sparse = [(t.shape, t.is_coalesced(), t.requires_grad) if t.layout is torch.sparse_coo else None for t in tensors]
    parts = [part for t in tensors for part in (parts_of(t) if t.layout is torch.sparse_coo else [t])]
    formats = [_Format.for_tensor(part) for part in parts]
    description = json.dumps([form, [_words_in(part.description) for part in formats], sparse]).encode()
    starts = [HEADER_BYTES + _whole_lines(len(description))]
    for part in formats:
        starts.append(starts[-1] + _whole_lines(part.nbytes - HEADER_BYTES))
    header = _PREFIX.pack(_MAGIC, Kind.TREE, *note) + struct.pack("<q", len(description))
    device = next((t.device for t in parts if t.device.type != "cpu"), _CPU)
    with torch.inference_mode(False):
        room = aligned_room(starts[-1], device)
        room[HEADER_BYTES : HEADER_BYTES + len(description)].copy_(_byte_tensor(description))
        for tensor, part, start in zip(parts, formats, starts, strict=False):
            part.layout.fill(part.layout.over(room, part.dtype, start), tensor.detach())
    return Packed(room, header)


def _unpack_tree(room: Tensor, nbytes: int) -> Tree:
    """The tree whose description takes ``nbytes`` after the header."""
    description = room[HEADER_BYTES : HEADER_BYTES + nbytes].cpu()
    form, formats, sparse = json.loads(bytes(memory_of(description)))
    parts, start = [], HEADER_BYTES + _whole_lines(nbytes)
    for words in formats:
        part, nbytes = _tensor_on(room, start, words)
        parts.append(part)
        start += _whole_lines(nbytes)
    rest = iter(parts)
    tensors = (
        sparse_of(next(rest), next(rest), *spec[:2]).requires_grad_(spec[2]) if spec else next(rest) for spec in sparse
    )
    return unflatten(form, tensors)


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // LINE_BYTES) * LINE_BYTES


def read_header(room: Tensor) -> Header:
    """The header of a message in a buffer, uint8, on any device.

    Raises:
        RuntimeError: no message of this version of dtrp.
    """
    header = room if room.device.type == "cpu" else room[:HEADER_BYTES].cpu()
    return _header_in(memory_of(header))


def _header_in(memory: memoryview) -> Header:
    magic, kind, *note = _PREFIX.unpack_from(memory)
    if magic != _MAGIC:
        raise RuntimeError("a message that is none of dtrp's; all ranks must run the same version of dtrp")
    return Header(_KINDS[kind], Note(*note), bytes(memory[_PREFIX.size : HEADER_BYTES]))


def decode(header: Header, room: Tensor) -> Message:
    """The message with this header in the buffer ``room``; its tensor stands on the buffer."""
    value = None
    if header.kind is Kind.TREE:
        value = _unpack_tree(room, struct.unpack_from("<q", header.rest)[0])
    elif header.kind in (Kind.TENSOR, Kind.OBJECT):
        value = _tensor_on(room, HEADER_BYTES, _words_in(header.rest))[0]
    return Message(header.kind, header.note, value)


def _words_in(data: bytes) -> tuple[int, ...]:
    """The numbers that describe a tensor, at the beginning of ``data``; see `_TENSOR`."""
    dims = _TENSOR.unpack_from(data)[1]
    return struct.unpack_from(f"<{_TENSOR.size // 8 + 2 * dims}q", data)


def _tensor_on(room: Tensor, start: int, words: Sequence[int]) -> tuple[Tensor, int]:
    """The tensor that ``words`` describe, which lies at ``start`` in the buffer, and the bytes that it takes there."""
    number, dims, span, shift, flags = words[:5]
    wants_gradient, dtype = bool(flags & _WANTS_GRADIENT), _DTYPES[number]
    layout = Layout(tuple(words[5 : 5 + dims]), tuple(words[5 + dims : 5 + 2 * dims]), span, shift)
    nbytes = shift + span * dtype.itemsize
    if not flags & _COMPACT:
        return layout.over(room, dtype, start).requires_grad_(wants_gradient), nbytes
    sent = Layout.contiguous(layout.shape)
    tensor = layout.over(aligned_room(nbytes, room.device), dtype)
    layout.fill(tensor, sent.over(room, dtype, start))
    return tensor.requires_grad_(wants_gradient), sent.span * dtype.itemsize


class ReceiveBuffer:
    """A buffer on the CPU, made ready for tensors with the layouts of earlier messages.

    After a long wait a processor's caches are cold, and a little work takes ten times as long. So as much as possible
    is done before the wait.

    Args:
        room: the buffer, uint8.
        expected: descriptions of the tensors that have come, as bytes, from the buffer of the message before.

    Attributes:
        expected: the same for the buffer of the next message.
    """

    def __init__(self, room: Tensor, expected: tuple[bytes, ...] = ()) -> None:
        self.expected = expected
        self._room, self._memory = room, memory_of(room)
        self._ready: list[tuple[bytes, Tensor]] = []  # a description, and that tensor on the buffer
        for description in expected:
            words = _words_in(description)
            number, _, span, shift, flags = words[:5]
            fits = HEADER_BYTES + shift + span * _DTYPES[number].itemsize <= room.numel()
            if fits and not flags & _COMPACT:
                self._ready.append((description, _tensor_on(room, HEADER_BYTES, words)[0]))

    def message(self) -> Message:
        """The message that has been received."""
        header = _header_in(self._memory)
        if header.kind is Kind.TENSOR:
            for description, tensor in self._ready:
                if header.rest.startswith(description):
                    return Message(header.kind, header.note, tensor)
            came = header.rest[: 8 * len(_words_in(header.rest))]
            self.expected = (came, *[known for known in self.expected if known != came])[:_MOST_EXPECTED]
        return decode(header, self._room)
