"""The server's end of the socket to one worker: non-blocking, on the loop, descriptors included."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from enginehouse.execution.messages import FrameReader, ToServer, encode

_RECEIVE_BYTES = 1 << 18


class Channel:
    """`on_message` gets each message in order. `on_end` is called once, when the other side has gone or
    talks nonsense; nothing comes after it."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[Any], None],
        on_end: Callable[[str], None],
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._fd = sock.fileno()
        self._loop = loop
        self._on_message = on_message
        self._on_end = on_end
        self._frames = FrameReader(ToServer)
        self._unsent: deque[tuple[bytes, int]] = deque()
        self._open = True
        loop.add_reader(self._fd, self.read_available)

    def send(self, message: msgspec.Struct, descriptor: int = -1) -> None:
        """Sends at once, or keeps what the socket doesn't take. To a worker that has gone: nothing.

        Owns the descriptor from here on: it is closed when it has been sent.
        """
        if not self._open:
            _close(descriptor)
            return
        data = encode(message)
        if not self._unsent:
            sent = self._send_now(data, descriptor)
            if sent == len(data):
                return
            data, descriptor = data[sent:], descriptor if sent == 0 else -1
            self._loop.add_writer(self._fd, self._write_unsent)
        self._unsent.append((data, descriptor))

    def _send_now(self, data: bytes, descriptor: int) -> int:
        """How many bytes went; all of them if there is nobody to take them."""
        try:
            if descriptor >= 0:
                sent = socket.send_fds(self._socket, [data], [descriptor])
            else:
                sent = self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            sent = len(data)  # the death watch or the next read tells
        _close(descriptor)
        return sent

    def _write_unsent(self) -> None:
        while self._unsent:
            data, descriptor = self._unsent.popleft()
            sent = self._send_now(data, descriptor)
            if sent < len(data):
                self._unsent.appendleft((data[sent:], descriptor if sent == 0 else -1))
                return
        if self._open:
            self._loop.remove_writer(self._fd)

    def read_available(self) -> None:
        """Handles everything that has arrived; after the other side's death that is all there will be."""
        while self._open:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it left our last message unread; what it had sent before is still to come
            except OSError as problem:
                self._end(str(problem))
                return
            if not data:
                self._end("it closed its channel")
                return
            try:
                messages = self._frames.feed(data)
            except (ValueError, msgspec.MsgspecError) as problem:
                self._end(f"it sent something unintelligible ({problem})")
                return
            for message in messages:
                self._on_message(message)
            if len(data) < _RECEIVE_BYTES:
                return

    def _end(self, reason: str) -> None:
        self.close()
        self._on_end(reason)

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._fd)
        if self._unsent:
            self._loop.remove_writer(self._fd)
            for _, descriptor in self._unsent:
                _close(descriptor)
            self._unsent.clear()
        self._socket.close()


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)
