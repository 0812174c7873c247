"""What one message between two ranks looks like: a header of fixed size, and a tensor that arrives as it lay.

::

    0                 512              512 + shift          nbytes
    | header, int64s  | (to the place  | the tensor's       |
    |                 |  in its line)  | elements, as laid  |

Both sides lay a buffer at the beginning of a line, so that the received tensor, which stands on the
buffer itself, has the strides of the one sent and its address modulo the line: see `dtrp.tensors.layout`.

A tree of tensors is one message too, and so is a sparse tensor: after the header comes, as JSON, its form and how each tensor lies,
of a sparse one its indices and values; then, each from the beginning of a line, the tensors. A tensor says whether it wants a
gradient back, and says so where it arrives.
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

HEADER_BYTES = LINE_BYTES
_MAGIC = 0x64747270_0003  # "dtrp", and the version of this layout
_MOST_DIMS = 24
_CPU = torch.device("cpu")
_MOST_FREE = 20  # messages of one layout whose memory is kept; there are seldom more than two under way
_MOST_FORMS = 8  # layouts whose memory is kept: full and partial mini-batches, and their parts
_MOST_KNOWN = 2  # layouts that a landing is ready for: the same tensor begins at one place of its line or another
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
        return cls.TENSOR if isinstance(value, Tensor) and value.layout is torch.strided else cls.TREE


_KINDS = tuple(Kind)  # by value: a call of an enum takes ten times as long


class Note(NamedTuple):
    """What a message says of its micro-batch.

    Args:
        microbatch, minibatch: m and b(m).
        parts: micro-batches in the mini-batch.
        samples: in the micro-batch.
        total: samples in the mini-batch.
        checksum: of the mini-batch's targets as the first rank was given them; -1: it was not.
        word: forward, what all ranks agree on in this mini-batch; backward, what a rank proposes: see `dtrp.comm.proposals`.
    """

    microbatch: int = -1
    minibatch: int = -1
    parts: int = 0
    samples: int = 0
    total: int = 0
    checksum: int = -1
    word: int = 0


_BEGINNING = struct.Struct(f"<{2 + len(Note._fields)}q")  # of every header: the magic number, the kind, the note
_ABOUT = struct.Struct("<5q")  # what a header says of a tensor begins so, and goes on with its shape and its strides


class Message(NamedTuple):
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
    about: bytes  # these, packed
    expanded: bool  # whether its elements share their place

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
        words = (*about, *wanted.shape, *wanted.strides)
        return cls(sent, tensor.dtype, nbytes, words, struct.pack(f"<{len(words)}q", *words), sent.expanded)


@dataclass(eq=False, slots=True)
class Packed:
    """A message: its bytes, on the tensor's device, and the header that goes to their beginning."""

    buffer: Tensor
    header: bytes
    inside: Tensor | None = None  # the tensor that stands on the buffer
    free: list[Packed] | None = None  # where messages of its layout wait to be used again
    _memory: memoryview | None = None  # the buffer's, once it has been looked up

    def seal(self) -> None:
        """Write the header."""
        if self._memory is None and self.buffer.device.type == "cpu":
            self._memory = memory_of(self.buffer)
        if self._memory is not None:
            self._memory[: len(self.header)] = self.header
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
        header = _BEGINNING.pack(_MAGIC, kind, *note)
        if tensor is None:
            return Packed(aligned_room(HEADER_BYTES, _CPU), header)
        form, free = self._form(tensor)
        header += form.about
        if free:
            packed = free.pop()
            packed.header = header
        else:
            # Memory that outlives the call: not an inference tensor, whatever the caller's mode.
            with torch.inference_mode(False):
                room = aligned_room(form.nbytes, tensor.device)
                packed = Packed(room, header, form.layout.over(room, form.dtype, HEADER_BYTES), free)
        assert packed.inside is not None
        if form.expanded:
            form.layout.fill(packed.inside, tensor.detach())
        else:
            packed.inside.copy_(tensor.detach())
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
    sparse = [(t.shape, t.is_coalesced(), t.requires_grad) if t.layout is torch.sparse_coo else None for t in tensors]
    parts = [part for t, of in zip(tensors, sparse, strict=True) for part in (parts_of(t) if of else [t])]
    forms = [_Form.of(part) for part in parts]
    about = json.dumps([form, [each.words for each in forms], sparse]).encode()
    starts, end = [], HEADER_BYTES + _whole_lines(len(about))
    for each in forms:
        starts.append(end)
        end += _whole_lines(each.nbytes - HEADER_BYTES)
    words = (_MAGIC, Kind.TREE, *note, len(about))
    place = next((t.device for t in parts if t.device.type != "cpu"), _CPU)
    with torch.inference_mode(False):
        room = aligned_room(end, place)
        room[HEADER_BYTES : HEADER_BYTES + len(about)].copy_(torch.frombuffer(bytearray(about), dtype=torch.uint8))
        for tensor, each, start in zip(parts, forms, starts, strict=True):
            each.layout.fill(each.layout.over(room, each.dtype, start), tensor.detach())
    return Packed(room, struct.pack(f"<{len(words)}q", *words))


def _unpack_tree(room: Tensor, nbytes: int) -> Any:
    about = room[HEADER_BYTES : HEADER_BYTES + nbytes].cpu()
    form, forms, sparse = json.loads(bytes(memory_of(about)))
    parts, start = [], HEADER_BYTES + _whole_lines(nbytes)
    for words in forms:
        part, nbytes = _standing(words, room, start)
        parts.append(part)
        start += _whole_lines(nbytes)
    rest = iter(parts)
    tensors = (
        next(rest) if of is None else sparse_of(next(rest), next(rest), *of[:2]).requires_grad_(of[2]) for of in sparse
    )
    return unflatten(form, tensors)


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // LINE_BYTES) * LINE_BYTES


def read_header(room: Tensor) -> tuple[Kind, Note, bytes]:
    """What the header of a received message says: its kind, its note, and what follows them.

    Raises:
        RuntimeError: it is no message.
    """
    header = room if room.device.type == "cpu" else room[:HEADER_BYTES].cpu()
    return _read(memory_of(header))


def _read(memory: memoryview) -> tuple[Kind, Note, bytes]:
    magic, kind, *note = _BEGINNING.unpack_from(memory)
    if magic != _MAGIC:
        raise RuntimeError("a message that is none of dtrp's; all ranks must run the same version of dtrp")
    return _KINDS[kind], Note(*note), bytes(memory[_BEGINNING.size : HEADER_BYTES])


def decode(header: tuple[Kind, Note, bytes], room: Tensor) -> Message:
    """The message in ``room``, its tensor standing on it.

    Args:
        header: what `read_header` made of it.
        room: the buffer that was received.
    """
    kind, note, rest = header
    if kind is Kind.GROW:
        return Message(kind, note, nbytes=note.total)
    if kind is Kind.TREE:
        return Message(kind, note, _unpack_tree(room, struct.unpack_from("<q", rest)[0]))
    if kind not in (Kind.TENSOR, Kind.OBJECT):
        return Message(kind, note)
    return Message(kind, note, _standing(_words(rest), room, HEADER_BYTES)[0])


def _words(about: bytes) -> tuple[int, ...]:
    """Those that are about a tensor, of bytes that begin with them."""
    dims = _ABOUT.unpack_from(about)[1]
    return struct.unpack_from(f"<{_ABOUT.size // 8 + 2 * dims}q", about)


class Landing:
    """Memory that a message is received into, made ready for tensors that lie as those before did.

    After a long wait a processor's caches are cold, and a little work takes ten times as long as it would: so what can be is
    done before the wait.

    Args:
        room: the memory, on the CPU.
        known: layouts of messages that have come, from the last one's landing.

    Attributes:
        known: the same for the next landing.
    """

    def __init__(self, room: Tensor, known: tuple[bytes, ...] = ()) -> None:
        self.known = known
        self._room, self._memory = room, memory_of(room)
        # What a header would say of a tensor, and that tensor, on the room.
        self._ready: list[tuple[bytes, Tensor]] = []
        for about in known:
            words = _words(about)
            number, _, span, shift, flags = words[:5]
            fits = HEADER_BYTES + shift + span * _DTYPES[number].itemsize <= room.numel()
            if fits and not flags & _COMPACT:
                self._ready.append((about, _standing(words, room, HEADER_BYTES)[0]))

    def message(self) -> Message:
        """What has been received."""
        kind, note, rest = header = _read(self._memory)
        if kind is Kind.TENSOR:
            for about, tensor in self._ready:
                if rest.startswith(about):
                    return Message(kind, note, tensor)
            about = rest[: 8 * len(_words(rest))]
            self.known = (about, *[each for each in self.known if each != about])[:_MOST_KNOWN]
        return decode(header, self._room)


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
