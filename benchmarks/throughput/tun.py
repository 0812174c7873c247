"""The methods on a link that really is slow: two network namespaces joined by a delay line in user space.

::

    rank 0, namespace 0                                                 rank 1, namespace 1
    10.83.0.1 -- TUN device -- [ each packet waits its time, in order ] -- TUN device -- 10.83.0.2
                               the delay line, a process

Each rank moves itself into a namespace of its own and hands its device to the delay line, so nothing stays
behind when they end. It takes root on Linux and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import select
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from contenders import Contender, chosen
from ranks import launch
from sleeping import FORWARD_S, LATENCY, Options, report_losses, rounds_of

ADDRESSES = ("10.83.0.1", "10.83.0.2")
DEVICE = "link0"
MTU = 65535
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU = 0x8914, 0x8916, 0x891C, 0x8922
_IFF_UP_RUNNING = 0x41


def run(options: Options) -> None:
    """The part `tun`; says why where it cannot run."""
    reason = why_not()
    if reason is not None:
        print(f"tun: skipped, {reason}")
        return
    with slow_link() as link:
        launch(delayed, 2, options, link, address=ADDRESSES[0])


@contextlib.contextmanager
def slow_link(latency_s: float = 0.0) -> Iterator[Link]:
    """A link for two ranks that are launched with `ADDRESSES[0]` for their address, and its delay line, which ends with them."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warning that an address has no name here
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        link = Link(str(Path(folder, "line")), context.Value("d", latency_s))
        line = context.Process(target=delay_line, args=(link,), daemon=True)
        line.start()
        try:
            yield link
        finally:
            line.terminate()
            line.join()


def why_not() -> str | None:
    """What is missing here, or None."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "it needs root"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    probe = multiprocessing.get_context("spawn").Process(target=_probe, args=(sender,))
    probe.start()
    sender.close()
    try:
        reason: str | None = receiver.recv()
    except EOFError:
        reason = "a process that tried a namespace and a TUN device died"
    probe.join()
    return reason


def _probe(answer: Any) -> None:
    try:
        enter_namespace(ADDRESSES[0])
    except OSError as error:
        answer.send(f"a namespace with a TUN device is not permitted here: {error}")
    else:
        answer.send(None)


# -- the link ---------------------------------------------------------------------------------------------


@dataclass
class Link:
    """What the ranks and the delay line share.

    Args:
        path: of the socket over which the ranks hand in their devices.
        latency: seconds one way.
    """

    path: str
    latency: Any

    def prepare(self, rank: int) -> None:
        """Move this process into a namespace whose only way out is the delay line."""
        device = enter_namespace(ADDRESSES[rank])
        with socket.socket(socket.AF_UNIX) as line:
            for _ in range(100):
                try:
                    line.connect(self.path)
                    break
                except OSError:  # not there yet
                    time.sleep(0.1)
            socket.send_fds(line, [b"d"], [device])
            line.recv(1)
        os.environ["GLOO_SOCKET_IFNAME"] = DEVICE


def enter_namespace(address: str) -> int:
    """A new network namespace for this process, with a loopback and a TUN device; the device's file descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, text in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.0")):
            packed = struct.pack("16sHH4s16x", DEVICE.encode(), socket.AF_INET, 0, socket.inet_aton(text))
            fcntl.ioctl(control, request, packed)
        fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", DEVICE.encode(), MTU))
        for name in ("lo", DEVICE):
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), _IFF_UP_RUNNING))
    return device


def delay_line(link: Link) -> None:
    """Carry packets between the two devices, each ``latency`` after it came, in order, until the devices go."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(link.path)
        server.listen(2)
        ranks = [server.accept()[0] for _ in ADDRESSES]
        ends = [socket.recv_fds(rank, 1, 1)[1][0] for rank in ranks]
        for rank in ranks:
            rank.send(b"d")
    waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}  # by the end they came from
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    try:
        while True:
            due = min((packets[0][0] for packets in waiting.values() if packets), default=None)
            pause = None if due is None else max(0.0, due - time.perf_counter())
            for end in select.select(ends, [], [], pause)[0]:
                waiting[end].append((time.perf_counter() + link.latency.value, os.read(end, MTU)))
            now = time.perf_counter()
            for end, packets in waiting.items():
                while packets and packets[0][0] <= now:
                    os.write(other[end], packets.popleft()[1])
    except OSError:  # a rank has ended, and its namespace with it
        return


def measured_latency_s(echoes: int = 20) -> float:
    """Half a round trip of a datagram between the ranks, the median; the same answer on both."""
    rank = dist.get_rank()
    trips = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.bind((ADDRESSES[rank], 9))
        wire.settimeout(30.0)
        dist.barrier()
        for _ in range(echoes):
            begin = time.perf_counter()
            if rank == 0:
                wire.sendto(b"e", (ADDRESSES[1], 9))
            wire.recv(1)
            if rank == 1:
                wire.sendto(b"e", (ADDRESSES[0], 9))
            trips.append(time.perf_counter() - begin)
        dist.barrier()
    answer = [statistics.median(trips) / 2]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


# -- the run ----------------------------------------------------------------------------------------------


def contenders() -> list[Contender]:
    return [
        Contender("dtrp", "dtrp"),
        Contender("dtrp", "fdg"),
        Contender("dtrp", "bp", 2),
        Contender("torch", "1F1B", 2),
    ]


def delayed(options: Options, link: Link) -> None:
    """The methods at each latency; runs on both ranks."""
    os.environ[LATENCY] = "0"  # the link's own is enough

    def set_latency(seconds: float) -> None:
        if dist.get_rank() == 0:
            link.latency.value = seconds
        dist.barrier()

    latencies = (0.0, FORWARD_S / 2, 0.9 * FORWARD_S)
    measured = {}
    for latency in latencies:
        set_latency(latency)
        measured[latency] = measured_latency_s()
    methods = chosen(contenders(), options.only)
    cases = [(method, latency) for method in methods for latency in latencies]
    link_text = "TUN devices in two network namespaces, joined by a delay line"
    all_turns = rounds_of("tun", cases, options, link=link_text, set_latency=set_latency, measured_s=measured)
    if dist.get_rank() == 0:
        trips = ", ".join(f"{1e3 * got:.2f} ms where {1e3 * want:g} is asked" for want, got in measured.items())
        print(f"\nmeasured one way: {trips}")
        report_losses(2, all_turns, {0.5: ("dtrp", "fdg"), 0.9: ("dtrp", "fdg")})
