"""The worker's end of the socket and of the two slabs.

Threads take turns at reading: whoever waits for something reads for all, and hands over when it has what it
waited for. So a model of one thread is never woken by another one, and a model with many threads works too.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from enginehouse.errors import ResourceExhausted
from enginehouse.execution import messages as m
from enginehouse.execution.slab import NO_BLOCK, ReaderSlab, Segment, WriterSlab

_RECEIVE_BYTES = 1 << 16
_ANCILLARY_BYTES = socket.CMSG_SPACE(8 * array("i").itemsize)


class ChannelClosed(BaseException):
    """The server has gone or wants this process to leave. No Exception: models must not swallow it."""


class WorkerChannel:
    """`on_message` runs on whichever thread reads; it may not wait for another message. `on_closed` is called
    on the thread of `read_in_thread`."""

    def __init__(self, sock: socket.socket, on_message: Callable[[Any], None], on_closed: Callable[[], None]) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._on_message = on_message
        self._on_closed = on_closed
        self._reader: threading.Thread | None = None
        self._frames = m.FrameReader(m.ToWorker)
        self._descriptors: deque[int] = deque()
        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)
        self._num_waiting = 0
        self._reading = False
        self._closed = False
        self._send_lock = threading.Lock()
        self._slab_lock = threading.Lock()
        self.incoming = ReaderSlab(writable=True)
        self.outgoing = WriterSlab()
        self._segment_wanted = False
        self._segment_refusals: list[str] = []

    # --- sending

    def send(self, message: msgspec.Struct) -> None:
        data = m.encode(message)
        with self._send_lock:
            try:
                self._socket.sendall(data)
            except OSError as problem:
                raise ChannelClosed from problem

    def allocate(self, nbytes: int) -> tuple[int, memoryview]:
        """A block for what is about to be sent; may wait for a further segment. Raises ResourceExhausted."""
        if nbytes == 0:
            return NO_BLOCK, memoryview(b"")
        while True:
            with self._slab_lock:
                block, memory = self.outgoing.allocate(nbytes)
            if block != NO_BLOCK:
                return block, memory
            self._ask_for_segment(nbytes)

    def give_back(self, block: int) -> None:
        """A block that was not sent after all."""
        if block != NO_BLOCK:
            with self._slab_lock:
                self.outgoing.free([block])

    def _ask_for_segment(self, nbytes: int) -> None:
        num_segments, num_refusals = self.outgoing.num_segments, len(self._segment_refusals)
        if not self._segment_wanted:
            self._segment_wanted = True
            self.send(m.NeedSegment(nbytes))
        self.wait_until(lambda: self.outgoing.num_segments > num_segments or len(self._segment_refusals) > num_refusals)
        self._segment_wanted = False
        if len(self._segment_refusals) > num_refusals:
            raise ResourceExhausted(self._segment_refusals[-1])

    # --- receiving

    def read_in_thread(self) -> None:
        """From now on a thread reads, whatever the others do."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read_for_ever, name="channel", daemon=True)
            self._reader.start()

    def _read_for_ever(self) -> None:
        try:
            self.wait_until(lambda: False)
        except ChannelClosed:
            self._on_closed()

    def wait_until(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Blocks until `done()`, which some message makes true; reads for everyone meanwhile. The value of
        `done()` at the end. Raises ChannelClosed when there is nobody to hear from any more."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        lock = self._lock
        with lock:
            while not done():
                if self._closed:
                    raise ChannelClosed
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return False
                if self._reading:
                    self._num_waiting += 1
                    self._turn.wait(left_s)
                    self._num_waiting -= 1
                    continue
                self._reading = True
                lock.release()
                try:
                    self._read(left_s)
                finally:
                    lock.acquire()
                    self._hand_over()
            return True

    def _hand_over(self) -> None:
        """With the lock held: somebody else may read; whoever waits looks whether it has come."""
        self._reading = False
        if self._num_waiting:
            self._turn.notify_all()

    def poll(self) -> None:
        """Takes in what has arrived, unless another thread is reading anyway."""
        with self._lock:
            if self._reading or self._closed:
                return
            self._reading = True
        try:
            self._read(0.0)
        finally:
            with self._lock:
                self._hand_over()

    def _read(self, timeout_s: float | None) -> None:
        flags = 0
        if timeout_s is not None:
            flags = socket.MSG_DONTWAIT
            if timeout_s > 0:
                poller = select.poll()
                poller.register(self._socket, select.POLLIN)
                poller.poll(timeout_s * 1000)
        try:
            # Not socket.recv_fds: Python 3.11's forgets the flags.
            data, ancillary, _, _ = self._socket.recvmsg(_RECEIVE_BYTES, _ANCILLARY_BYTES, flags)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        if not data:
            self._closed = True
            raise ChannelClosed
        for _, _, raw in ancillary:
            self._descriptors.extend(array("i", raw))
        for message in self._frames.feed(data):
            if not self._take_memory(message):
                self._on_message(message)

    def _take_memory(self, message: Any) -> bool:
        """Handles what is about the slabs alone. Whether there is nothing else to it."""
        kind = type(message)
        if kind is m.Execute or kind is m.InferAnswer or kind is m.Taken:
            if message.freed:
                with self._slab_lock:
                    self.outgoing.free(message.freed)
            return False
        if kind is m.Freed:
            with self._slab_lock:
                self.outgoing.free(message.freed)
        elif kind is m.Segment:
            fd = self._descriptors.popleft()
            segment = Segment(fd, message.nbytes)
            os.close(fd)
            with self._slab_lock:
                (self.outgoing if message.of_worker else self.incoming).add(segment)
        elif kind is m.Trim:
            with self._slab_lock:
                self.outgoing.give_back_pages(num_kept=1)  # the progress words
        elif kind is m.NoSegment:
            self._segment_refusals.append(message.reason)
        else:
            return False
        return True
