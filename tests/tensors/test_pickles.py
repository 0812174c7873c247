"""Pickles of strangers: whatever is in them, nothing runs, nothing is changed, and the process lives."""

from __future__ import annotations

import collections
import pickle
import pickletools
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import FIXED, damages
from damaged_checkpoints import check_refused, forge, make
from helpers import examples, saved_both_ways
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem, metadata

import dtrp
from dtrp.data import cifar
from dtrp.saving import manifest, tensors
from dtrp.saving.tensors import Reader
from dtrp.tensors.pickles import Record, Unpickler

DEEP = b")" + b"\x85" * 300_000  # tuples in tuples: hashing the outermost would overflow the stack
WIDE = b")" + b"2\x86" * 60  # each holds the one before twice: hashing the last would take for ever
KEYS = {
    "SETITEM": b"}%bNs.",
    "SETITEMS": b"}(%bNu.",
    "DICT": b"(%bNd.",
    "FROZENSET": b"(%b\x91.",
    "ADDITEMS": b"\x8f(%b\x90.",
}


@pytest.mark.parametrize("key", [DEEP, WIDE], ids=["deep", "wide"])
@pytest.mark.parametrize("opcode", KEYS)
def test_no_hash_of_what_a_file_makes(opcode: str, key: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, KeyError), match=r"a key is a tuple|^14[35]$"):
        Unpickler(b"\x80\x04" + KEYS[opcode] % key, {}).load()


def test_a_frozen_record_is_told_its_state_and_nothing_else() -> None:
    """BUILD of a class, of an instance, of text."""
    stand_ins = {("m", "C"): type("C", (Record,), {}), ("m", "text"): "text"}
    state = b"N}V__init__\nNs\x86b."
    made = Unpickler(b"\x80\x02cm\nC\n)\x81" + state, stand_ins).load()
    assert made.state == (None, {"__init__": None})
    for name in ("C", "text"):
        with pytest.raises((TypeError, AttributeError), match=r"__setstate__|__init__"):
            Unpickler(b"\x80\x02cm\n" + name.encode() + b"\n" + state, stand_ins).load()


# -- metadata of checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return saved_both_ways(make(), tmp_path_factory.mktemp("saved")) / "portable"


FLOAT, SIZE = torch.float32, torch.Size([3, 2])
SMALL = metadata.Metadata(
    {
        name: metadata.TensorStorageMetadata(
            metadata.TensorProperties(FLOAT), SIZE, [metadata.ChunkStorageMetadata(torch.Size([0, 0]), SIZE)]
        )
        for name in ("a", "b")
    },
    planner_data={"a": ("a",), "b": ("b",)},
    storage_data={
        metadata.MetadataIndex(name, torch.Size([0, 0]), 0): filesystem._StorageInfo("__0_0.distcp", start, 30)
        for name, start in (("a", 0), ("b", 30))
    },
    storage_meta=metadata.StorageMeta(),
)
RAW = pickle.dumps(SMALL, protocol=4)
assert RAW[2:3] == pickle.FRAME
RAW = RAW[:2] + RAW[11:]  # without the frame's length, which nothing put in would fit


def read(folder: Path, raw: bytes) -> Any:
    (folder / manifest.METADATA).write_bytes(raw)
    return Reader(folder, {"__0_0.distcp": 60}).read_metadata()


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, RAW)
    assert found.state_dict_metadata == SMALL.state_dict_metadata
    assert found.storage_data == SMALL.storage_data


@pytest.mark.parametrize("key", [DEEP, WIDE], ids=["deep", "wide"])
@pytest.mark.parametrize("before", [b"\x8c\x07float32\x94\x93\x94", b"\x8c\x03fqn\x94"], ids=["dtype", "name"])
def test_what_is_looked_up_is_text(tmp_path: Path, before: bytes, key: bytes) -> None:
    assert before in RAW
    end = RAW.index(before) + len(before)
    old, new = (
        (RAW[end : end + 2], key) if b"fqn" in before else (b"", b"0" + key)
    )  # a memo's entry; what stands there, popped
    with pytest.raises(dtrp.CheckpointError, match="a tuple where a str is expected"):
        read(tmp_path, RAW[:end] + new + RAW[end + len(old) :])


CLASSES = [
    *(value for value in vars(metadata).values() if isinstance(value, type) and value.__module__.startswith("torch")),
    filesystem._StorageInfo, filesystem.FileSystemReader, Reader, Record, Unpickler, *tensors._STAND_INS.values(), cifar._Array,
    cifar._NumberType, torch.Size, torch.Tensor, torch.dtype, torch.nn.Parameter, collections.OrderedDict,
    torch.serialization._get_layout, torch.storage._get_dtype_from_pickle_storage_type,
]  # fmt: skip


def attributes() -> list[dict[str, Any]]:
    """Of everything that a pickle of metadata or an array can name, and of what stands for it."""
    result = []
    for value in CLASSES:
        held = dict(vars(value)) if hasattr(value, "__dict__") else {}
        if isinstance(value, types.FunctionType):
            held |= {name: getattr(value, name) for name in ("__code__", "__defaults__", "__kwdefaults__")}
        result.append(held)
    return result


def test_a_forged_state_of_a_class_changes_nothing(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "c")
    before = attributes()
    for state in (b"}V__init__\nNs", b"N}V__init__\nNs\x86"):
        for module, name in tensors._STAND_INS:
            (tmp_path / "c" / ".metadata").write_bytes(f"c{module}\n{name}\n".encode() + state + b"b.")
            forge(tmp_path / "c")
            with pytest.raises(dtrp.CheckpointError, match=r"\.metadata is refused"):
                dtrp.saving.read_state(tmp_path / "c")
    check_refused(tmp_path / "c", r"\.metadata is refused")
    assert attributes() == before


def test_what_is_too_long_to_write_down_is_not_shown(tmp_path: Path) -> None:
    name = b"__0_0.distcp\x94"
    with pytest.raises(dtrp.CheckpointError, match="it names the file 'tuple'"):
        read(tmp_path, RAW.replace(name, name + b"0" + WIDE, 1))


def pieces(raw: bytes) -> list[bytes]:
    """A pickle, opcode by opcode."""
    starts = [position for _, _, position in pickletools.genops(raw)]
    return [raw[a:b] for a, b in zip(starts, [*starts[1:], len(raw)], strict=True)]


PIECES = pieces(RAW)
NAMES = ["__init__", "__new__", "__setstate__", "__class__", "__dict__", "__eq__", "__hash__", "__reduce__",
         "__code__", "__defaults__", "__bases__", "__doc__", "state", "arguments", "fqn", "size",
         "chunks", "relative_path", "offset"]  # fmt: skip
GLOBALS = st.sampled_from(
    [
        f"{module}\n{name}\n".encode()
        for module, name in tensors._STAND_INS
        if module != "torch" or name in ("Size", "int8")
    ]
)
OPCODES = st.sampled_from(
    [bytes([code]) for code in b"(.012N]})lt\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98RbQaedsuo\x81"]
)
STATE = st.builds(
    lambda name, slots: (b"N" if slots else b"") + b"}V" + name.encode() + b"\nNs" + (b"\x86" if slots else b""),
    st.sampled_from(NAMES), st.booleans(),
)  # fmt: skip
FRAGMENTS = st.one_of(
    OPCODES,
    OPCODES,
    STATE,
    GLOBALS.map(lambda name: b"c" + name),
    GLOBALS.map(lambda name: b"(i" + name),
    st.builds(lambda name, state: b"c" + name + state + b"b", GLOBALS, STATE),  # the state of a class
    st.builds(lambda name, state: b"c" + name + b")\x81" + state + b"b", GLOBALS, STATE),  # of an instance
    st.builds(lambda name, state: b"c" + name + b")R" + state + b"b", GLOBALS, STATE),
    st.integers(0, 255).map(lambda i: b"h" + bytes([i])),
    st.integers(0, 2**32 - 1).map(lambda i: b"r" + i.to_bytes(4, "little")),
    st.sampled_from([0, 1, 2**31, 2**63 - 1]).map(lambda n: b"\x8e" + n.to_bytes(8, "little")),
    st.sampled_from([0, 1, 2**31, 2**63 - 1]).map(lambda n: b"\x96" + n.to_bytes(8, "little")),
    st.sampled_from([0, 1, 2**31 - 1]).map(lambda n: b"\x8b" + n.to_bytes(4, "little")),
    st.sampled_from(NAMES).map(lambda name: b"V" + name.encode() + b"\n"),
    st.integers(-(2**70), 2**70).map(lambda i: b"I%d\n" % i),
    st.just(b"\x82\x01"),
    st.just(b"Ppersistent\n"),
    st.binary(max_size=3),
)
PLACES = st.integers(0, len(PIECES))
EDITS = st.one_of(
    st.builds(lambda at, new: lambda ops: [*ops[:at], *new, *ops[at:]], PLACES, st.lists(FRAGMENTS, max_size=4)),
    st.builds(lambda at, new: lambda ops: [*ops[:at], *new, *ops[at + 1 :]], PLACES, st.lists(FRAGMENTS, max_size=2)),
    st.builds(lambda at, other: lambda ops: [*ops[:at], *ops[other : other + 5], *ops[at:]], PLACES, PLACES),
    st.builds(lambda new: lambda ops: [b"\x80\x04", *new, b"."], st.lists(FRAGMENTS, max_size=12)),
)  # fmt: skip


def check_mutated(folder: Path, raw: bytes) -> bool:
    """Read or refused, by an error that names the file; whether it was read."""
    before = attributes()
    try:
        found = read(folder, raw)
    except dtrp.CheckpointError as error:
        assert str(folder / manifest.METADATA) in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return False
    finally:
        assert attributes() == before
    assert type(found) is metadata.Metadata
    for key, entry in found.state_dict_metadata.items():
        assert type(key) is str
        assert type(entry) is metadata.TensorStorageMetadata
        assert (type(entry.size), type(entry.properties.dtype)) == (torch.Size, torch.dtype)
    for index, info in found.storage_data.items():
        assert (type(index), type(info)) == (metadata.MetadataIndex, filesystem._StorageInfo)
        assert 0 <= info.offset <= info.offset + info.length <= 60
    return True


def mutated(edits: list[Callable[[list[bytes]], list[bytes]]]) -> bytes:
    ops = PIECES
    for edit in edits:
        ops = edit(ops)
    return b"".join(ops)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@settings(FIXED, max_examples=examples(500))
@given(edits=st.lists(EDITS, min_size=1, max_size=3))
def test_metadata_of_other_opcodes(place: Path, edits: list[Any]) -> None:
    check_mutated(place, mutated(edits))


@settings(FIXED, max_examples=examples(300))
@given(damage=damages(len(RAW)))
def test_damaged_metadata(place: Path, damage: Callable[[bytes], bytes]) -> None:
    check_mutated(place, damage(RAW))


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(FIXED, max_examples=50_000)
@given(edits=st.lists(EDITS, min_size=1, max_size=6), damage=st.none() | damages(len(RAW)))
def test_metadata_of_many_other_opcodes(place: Path, edits: list[Any], damage: Any) -> None:
    raw = mutated(edits)
    check_mutated(place, raw if damage is None else damage(raw))
