"""What one message between two ranks looks like: a header of fixed size, and a tensor that arrives as it lay.

::

    0                 512              512 + shift          nbytes
    | header, int64s  | (to the place  | the tensor's       |
    |                 |  in its line)  | elements, as laid  |

Both sides lay a buffer at the beginning of a line, so that the received tensor, which stands on the
buffer itself, has the strides of the one sent and its address modulo the line: see `dtrp.aligned`.

A tree of tensors is one message too: after the header comes, as JSON, its form and how each tensor lies; then, each from the
beginning of a line, the tensors. A tensor says whether it wants a gradient back, and says so where it arrives.
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

from .aligned import LINE_BYTES, Layout, aligned_room, shift_of
from .trees import flatten, unflatten

HEADER_BYTES = LINE_BYTES
_WORDS = HEADER_BYTES // 8
_MAGIC = 0x64747270_0002  # "dtrp", and the version of this layout
_MOST_DIMS = 24
_CPU = torch.device("cpu")
_MOST_FREE = 20  # messages of one layout whose memory is kept; there are seldom more than two under way
_MOST_FORMS = 8  # layouts whose memory is kept: full and partial mini-batches, and their parts
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
    GROW = 3  # the next message needs a buffer of so many bytes
    END = 4  # the sender sends no more
    TREE = 5  # tensors and constants in tuples, lists and dicts

    @classmethod
    def of(cls, value: Any) -> Kind:
        """The kind that carries a value between stages."""
        if value is None:
            return cls.NOTHING
        return cls.TENSOR if isinstance(value, Tensor) else cls.TREE


class Note(NamedTuple):
    """What a message says of its micro-batch.

    Args:
        microbatch, minibatch: m and b(m).
        parts: micro-batches in the mini-batch.
        samples: in the micro-batch.
        total: samples in the mini-batch.
        checksum: of the mini-batch's targets as the first rank was given them; -1: it was not.
        word: forward, what all ranks agree on in this mini-batch; backward, what a rank proposes: see `dtrp.agreeing`.
    """

    microbatch: int = -1
    minibatch: int = -1
    parts: int = 0
    samples: int = 0
    total: int = 0
    checksum: int = -1
    word: int = 0


@dataclass(frozen=True)
class Message:
    """A message as received.

    Args:
        kind, note: what the header says.
        tensor: what was sent: a tensor, for TREE a tree, or None.
        nbytes: for GROW, the size of the buffer that the next one needs.
    """

    kind: Kind
    note: Note
    tensor: Any = None
    nbytes: int = 0

    def object(self) -> Any:
        """What `object_tensor` packed."""
        assert self.kind is Kind.OBJECT
        assert self.tensor is not None
        return torch.load(io.BytesIO(memory_of(self.tensor)), map_location="cpu", weights_only=False)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, where they are, while it lives (`Tensor.numpy` would need NumPy)."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def object_tensor(value: Any) -> Tensor:
    """A picklable value as bytes; tensors in it arrive on the CPU."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


class _Form(NamedTuple):
    """What messages of one layout have in common."""

    layout: Layout  # as sent
    dtype: torch.dtype
    nbytes: int
    words: tuple[int, ...]  # the header's, about the tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES or tensor.dim() > _MOST_DIMS:
            raise TypeError(
                f"a stage's output has a {tensor.layout} tensor of {tensor.dtype} with {tensor.dim()} dimensions; ranks "
                f"exchange dense ones of the common dtypes with at most {_MOST_DIMS} dimensions"
            )
        # A tensor that is mostly holes, a column of a larger one, travels without them.
        wanted, sent = Layout.of(tensor, holes=True), Layout.of(tensor)
        nbytes = HEADER_BYTES + sent.shift + sent.span * tensor.element_size()
        flags = (wanted != sent) * _COMPACT + tensor.requires_grad * _WANTS_GRADIENT
        about = (_DTYPES.index(tensor.dtype), tensor.dim(), wanted.span, wanted.shift, flags)
        return cls(sent, tensor.dtype, nbytes, (*about, *wanted.shape, *wanted.strides))


class Packed(NamedTuple):
    """A message: its bytes, on the tensor's device, and the header that goes to their beginning."""

    buffer: Tensor
    header: bytes
    inside: Tensor | None = None  # the tensor that stands on the buffer
    free: list[Packed] | None = None  # where messages of its layout wait to be used again

    def seal(self) -> None:
        """Write the header."""
        if self.buffer.device.type == "cpu":
            memory_of(self.buffer)[: len(self.header)] = self.header
        else:
            self.buffer[: len(self.header)].copy_(torch.frombuffer(bytearray(self.header), dtype=torch.uint8))

    def give_back(self) -> None:
        """The message has been sent, and its memory may hold the next one of its layout."""
        if self.free is not None and len(self.free) < _MOST_FREE:
            self.free.append(self)


class Packer:
    """Makes messages, one layout after another in the same memory if it ``keeps`` what is given back."""

    def __init__(self, *, keeps: bool) -> None:
        self._keeps = keeps
        self._forms: dict[Any, tuple[_Form, list[Packed]]] = {}

    def pack(self, kind: Kind, note: Note, tensor: Any = None) -> Packed:
        """A message, whose header is not written yet.

        Raises:
            TypeError: what no message can carry.
        """
        if kind is Kind.TREE:
            return _pack_tree(note, tensor)
        words: tuple[int, ...] = (_MAGIC, kind, *note)
        if tensor is None:
            return Packed(aligned_room(HEADER_BYTES, _CPU), struct.pack(f"<{len(words)}q", *words))
        form, free = self._form(tensor)
        words += form.words
        header = struct.pack(f"<{len(words)}q", *words)
        try:
            packed = free.pop()._replace(header=header)
        except IndexError:
            # Memory that outlives the call: not an inference tensor, whatever the caller's mode.
            with torch.inference_mode(False):
                room = aligned_room(form.nbytes, tensor.device)
                packed = Packed(room, header, form.layout.over(room, form.dtype, HEADER_BYTES), free)
        assert packed.inside is not None
        form.layout.fill(packed.inside, tensor.detach())
        return packed

    def _form(self, tensor: Tensor) -> tuple[_Form, list[Packed]]:
        if not self._keeps or tensor.layout is not torch.strided:
            return _Form.of(tensor), []
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, shift_of(tensor), tensor.requires_grad)
        known = self._forms.get(key)
        if known is None:
            if len(self._forms) == _MOST_FORMS:
                self._forms.clear()
            known = self._forms[key] = (_Form.of(tensor), [])
        return known


def _pack_tree(note: Note, value: Any) -> Packed:
    tensors, form = flatten(value)
    forms = [_Form.of(t) for t in tensors]
    about = json.dumps([form, [each.words for each in forms]]).encode()
    starts, end = [], HEADER_BYTES + _whole_lines(len(about))
    for each in forms:
        starts.append(end)
        end += _whole_lines(each.nbytes - HEADER_BYTES)
    words = (_MAGIC, Kind.TREE, *note, len(about))
    place = next((t.device for t in tensors if t.device.type != "cpu"), _CPU)
    with torch.inference_mode(False):
        room = aligned_room(end, place)
        room[HEADER_BYTES : HEADER_BYTES + len(about)].copy_(torch.frombuffer(bytearray(about), dtype=torch.uint8))
        for tensor, each, start in zip(tensors, forms, starts, strict=True):
            each.layout.fill(each.layout.over(room, each.dtype, start), tensor.detach())
    return Packed(room, struct.pack(f"<{len(words)}q", *words))


def _unpack_tree(room: Tensor, nbytes: int) -> Any:
    about = room[HEADER_BYTES : HEADER_BYTES + nbytes].cpu()
    form, forms = json.loads(bytes(memory_of(about)))
    tensors, start = [], HEADER_BYTES + _whole_lines(nbytes)
    for words in forms:
        tensor, nbytes = _standing(words, room, start)
        tensors.append(tensor)
        start += _whole_lines(nbytes)
    return unflatten(form, iter(tensors))


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // LINE_BYTES) * LINE_BYTES


def read_header(room: Tensor) -> tuple[Kind, Note, tuple[int, ...]]:
    """What the header of a received message says: its kind, its note, and how its tensor lies.

    Raises:
        RuntimeError: it is no message.
    """
    header = room if room.device.type == "cpu" else room[:HEADER_BYTES].cpu()
    words = struct.unpack(f"<{_WORDS}q", memory_of(header)[:HEADER_BYTES])
    if words[0] != _MAGIC:
        raise RuntimeError("a message that is none of dtrp's; all ranks must run the same version of dtrp")
    count = len(Note._fields)
    return Kind(words[1]), Note(*words[2 : 2 + count]), words[2 + count :]


def decode(header: tuple[Kind, Note, tuple[int, ...]], room: Tensor) -> Message:
    """The message in ``room``, its tensor standing on it.

    Args:
        header: what `read_header` made of it.
        room: the buffer that was received.
    """
    kind, note, rest = header
    if kind is Kind.GROW:
        return Message(kind, note, nbytes=note.total)
    if kind is Kind.TREE:
        return Message(kind, note, _unpack_tree(room, rest[0]))
    if kind not in (Kind.TENSOR, Kind.OBJECT):
        return Message(kind, note)
    return Message(kind, note, _standing(rest, room, HEADER_BYTES)[0])


def _standing(words: Sequence[int], room: Tensor, start: int) -> tuple[Tensor, int]:
    """The tensor that a message says lies at ``start``, and the bytes that it takes there."""
    number, dims, span, shift, flags = words[:5]
    wants = bool(flags & _WANTS_GRADIENT)
    shape, strides = tuple(words[5 : 5 + dims]), tuple(words[5 + dims : 5 + 2 * dims])
    layout, dtype = Layout(shape, strides, span, shift), _DTYPES[number]
    if not flags & _COMPACT:
        return layout.over(room, dtype, start).requires_grad_(wants), shift + span * dtype.itemsize
    sent = Layout.contiguous(layout.shape)
    tensor = layout.over(aligned_room(shift + span * dtype.itemsize, room.device), dtype)
    layout.fill(tensor, sent.over(room, dtype, start))
    return tensor.requires_grad_(wants), sent.span * dtype.itemsize
