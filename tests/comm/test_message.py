"""A message is its tensor to the bit, laid out as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dtrp.comm.message import (
    HEADER_BYTES,
    Kind,
    Message,
    Note,
    Packer,
    ReceiveBuffer,
    decode,
    object_tensor,
    read_header,
)
from dtrp.tensors.layout import aligned_clone, aligned_room, shift_of

NOTE = Note(microbatch=7, minibatch=3, parts=2, samples=5, total=9, checksum=2**31)
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def encode(kind: Kind, note: Note, tensor: Tensor | None) -> Tensor:
    packed = Packer(reuses=False).pack(kind, note, tensor)
    packed.write_header()
    return packed.buffer


def carry(kind: Kind, note: Note, tensor: Tensor | None = None) -> Message:
    """What arrives, in a buffer of the receiver's that is larger and held something else."""
    sent = encode(kind, note, tensor)
    room = aligned_room(sent.numel() + 1000)
    room.fill_(0xA5)
    room[: sent.numel()].copy_(sent)
    del sent
    return decode(read_header(room), room)


def arrived(tensor: Tensor) -> Tensor:
    message = carry(Kind.TENSOR, NOTE, tensor)
    assert message.kind is Kind.TENSOR
    assert message.note == NOTE
    assert message.tensor is not None
    assert message.tensor.dtype == tensor.dtype
    assert message.tensor.shape == tensor.shape
    assert message.tensor.requires_grad == tensor.requires_grad
    assert torch.equal(message.tensor, tensor)
    return message.tensor


def check_layout(tensor: Tensor) -> None:
    got = arrived(tensor)
    assert got.stride() == tensor.stride()
    assert shift_of(got) == shift_of(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: torch.dtype) -> None:
    values = torch.randn(4, 6) * 3
    check_layout(values > 0 if dtype is torch.bool else values.abs().to(dtype))


def test_the_bits_of_what_is_no_number() -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1, 0x7FFFFFFF], dtype=torch.int32)
    message = carry(Kind.TENSOR, NOTE, bits.view(torch.float32))
    assert message.tensor is not None
    assert torch.equal(message.tensor.view(torch.int32), bits)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 4).t(),
        lambda: torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1),
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
        lambda: torch.randn(12, 11)[:, 3:9],
        lambda: torch.randn(12, 6)[::2],
        lambda: torch.randn(9, 5)[3:7],
        lambda: torch.randn(1, 5),
        lambda: torch.randn(3, 1, 5),
        lambda: torch.randn(()),
        lambda: torch.randn(7)[3],
        lambda: torch.randn(8, 5).requires_grad_(),
        lambda: torch.nn.Linear(5, 4)(torch.randn(8, 5)),
    ],
    ids=["transposed", "permuted", "channels last", "one channel", "channels last 3d", "columns", "every other row",
         "rows", "one row", "a dimension of one", "0-dim", "0-dim inside", "leaf", "in a graph"],
)  # fmt: skip
def test_strides_and_place_in_its_line(make: Any) -> None:
    check_layout(make())


@pytest.mark.parametrize("start", [0, 1, 2, 3, 16, 100, 127, 128, 129])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.complex128])
def test_a_part_that_starts_anywhere(dtype: torch.dtype, start: int) -> None:
    check_layout(torch.arange(400).to(dtype)[start : start + 200])


def test_a_tensor_that_starts_at_no_multiple_of_its_element() -> None:
    raw = bytearray(torch.randn(16).view(torch.uint8).tolist())
    arrived(torch.frombuffer(bytearray(b"?") + raw, dtype=torch.float32, offset=1))


def test_an_expanded_tensor_is_sent_once() -> None:
    tensor = torch.randn(6).expand(10000, 6)
    got = arrived(tensor)
    assert got.stride() == tensor.stride()
    assert encode(Kind.TENSOR, NOTE, tensor).numel() < 4 * HEADER_BYTES
    arrived(torch.randn(3, 1, 2).expand(3, 5, 2))
    arrived(torch.randn(()).expand(4, 4))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(10.0).as_strided((4, 3), (2, 1)),
        torch.randn(1000, 40)[:, ::39],
        torch.randn(4, 3, dtype=torch.complex64).conj(),
        torch.randn(4, 3, dtype=torch.complex64).conj().imag,
        torch.randn(5, 5).flip(0),
    ],
    ids=["overlapping", "mostly holes", "conjugate view", "negative view", "flipped"],
)
def test_views_that_have_no_layout_to_keep(tensor: Tensor) -> None:
    arrived(tensor)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0, 3)])
def test_an_empty_tensor_keeps_its_shape(shape: tuple[int, ...]) -> None:
    arrived(torch.empty(shape))


def test_many_dimensions_and_no_more() -> None:
    arrived(torch.randn((2, *[1] * 20, 3)))
    with pytest.raises(TypeError, match=r"30 dimensions.*at most"):
        encode(Kind.TENSOR, NOTE, torch.randn([1] * 30))


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.float8_e4m3fn)],
    ids=["sparse", "float8"],
)
def test_what_no_message_can_carry(tensor: Tensor) -> None:
    with pytest.raises(TypeError, match=r"a stage's output has a torch\..* tensor of torch\.float"):
        encode(Kind.TENSOR, NOTE, tensor)


def test_the_sender_may_write_its_tensor_and_the_receiver_its_own() -> None:
    tensor = torch.randn(4, 3)
    before = tensor.clone()
    room = encode(Kind.TENSOR, NOTE, tensor)
    tensor.zero_()
    message = decode(read_header(room), room)
    assert message.tensor is not None
    assert torch.equal(message.tensor, before)
    message.tensor.add_(1)
    assert message.tensor._base is None, "it may be written in place in a graph"


def test_a_message_without_a_tensor() -> None:
    message = carry(Kind.NOTHING, NOTE)
    assert message.kind is Kind.NOTHING
    assert message.note == NOTE
    assert message.tensor is None
    assert carry(Kind.END, Note()).kind is Kind.END


def test_a_note_that_more_room_is_needed() -> None:
    message = carry(Kind.GROW, Note(total=5 * 2**32))
    assert message.kind is Kind.GROW
    assert message.note.total == 5 * 2**32


def test_an_object_of_any_size() -> None:
    value = {"a": [1, None, "x" * 10000], "t": torch.arange(5), "n": {"m": (2.5, True)}}
    got = carry(Kind.OBJECT, Note(), object_tensor(value)).object()
    assert torch.equal(got.pop("t"), value.pop("t"))  # type: ignore[arg-type]
    assert got == value


def test_a_message_of_something_else_is_refused() -> None:
    room = aligned_room(2 * HEADER_BYTES)
    room.fill_(1)
    with pytest.raises(RuntimeError, match="the same version of dtrp"):
        read_header(room)


def test_memory_that_is_given_back_holds_the_next_message_of_its_layout() -> None:
    packer = Packer(reuses=True)
    a = torch.arange(6.0)
    b = aligned_clone(a).add_(1)
    first = packer.pack(Kind.TENSOR, NOTE, a)
    second = packer.pack(Kind.TENSOR, NOTE, b)
    assert first.buffer.data_ptr() != second.buffer.data_ptr(), "the first is still under way"
    first.release()
    third = packer.pack(Kind.TENSOR, NOTE._replace(microbatch=9), b)
    assert third.buffer.data_ptr() == first.buffer.data_ptr()
    third.write_header()
    message = decode(read_header(third.buffer), third.buffer)
    assert message.note.microbatch == 9
    assert message.tensor is not None
    assert torch.equal(message.tensor, b)
    other = packer.pack(Kind.TENSOR, NOTE, torch.arange(7.0))
    second.release()
    assert other.buffer.data_ptr() != second.buffer.data_ptr()
    for size in range(20):  # many layouts: memory of a few is kept
        packer.pack(Kind.TENSOR, NOTE, torch.zeros(size + 1)).release()
    assert len(packer._formats) <= 8


def test_a_landing_made_ready_for_layouts_that_came_before_takes_any_message() -> None:
    def at_line(tensor: Tensor) -> Tensor:
        return aligned_room(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    a, b, double = (
        at_line(torch.randn(4, 6)),
        at_line(torch.randn(40))[16:].view(4, 6),
        at_line(torch.randn(4, 6).double()),
    )
    wants, column, one, large = a.clone().requires_grad_(), torch.randn(30, 8)[:, 1], torch.randn(()), torch.randn(700)
    sequence = [
        a,
        a,
        b,
        b,
        a,
        b,
        double,
        a,
        wants,
        wants,
        a.t(),
        None,
        wants,
        column,
        column,
        double,
        double,
        large,
        one,
        one,
    ]
    known: tuple[bytes, ...] = ()
    ready = []
    for number, tensor in enumerate(sequence):
        note = NOTE._replace(microbatch=number)
        sent = encode(Kind.for_value(tensor), note, tensor)
        room = aligned_room(max(sent.numel(), HEADER_BYTES + 1000))
        landing = ReceiveBuffer(room, known)
        made = [each for _, each in landing._ready]
        room[: sent.numel()].copy_(sent)
        message, known = landing.message(), landing.expected
        assert (message.kind, message.note) == (Kind.for_value(tensor), note)
        ready.append(any(message.tensor is each for each in made))
        if tensor is None:
            assert message.tensor is None
            continue
        assert torch.equal(message.tensor, tensor)
        assert message.tensor.stride() == tensor.stride()
        assert message.tensor.requires_grad == tensor.requires_grad
        assert message.tensor.dtype == tensor.dtype
        assert shift_of(message.tensor) == shift_of(tensor)
    # Not a column of a larger tensor, which travels without the rest and is laid down elsewhere.
    assert [number for number, each in enumerate(ready) if each] == [1, 3, 4, 5, 9, 12, 16, 19]


def test_a_landing_refuses_what_is_no_message() -> None:
    room = aligned_room(2 * HEADER_BYTES)
    landing = ReceiveBuffer(room)
    room.fill_(1)
    with pytest.raises(RuntimeError, match="the same version of dtrp"):
        landing.message()
