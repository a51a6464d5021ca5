"""The socket between the server and a worker: nothing is lost when it is full, and its end comes once."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from enginehouse.execution import messages as m
from enginehouse.execution.channel import Channel
from enginehouse.execution.slab import MIN_SEGMENT_BYTES, Segment, make_segment
from enginehouse.execution.worker_channel import ChannelClosed, WorkerChannel

pytestmark = pytest.mark.asyncio


class Ends:
    """Both ends: ours as the server has it, theirs as a bare socket."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.messages: list[Any] = []
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.channel = Channel(ours, asyncio.get_running_loop(), self.messages.append, self.end.set_result)

    async def read_all(self, num_messages: int) -> tuple[list[Any], list[int]]:
        """What arrives at the other end, with its descriptors."""
        reader, received, descriptors = m.FrameReader(m.ToWorker), list[Any](), list[int]()

        def read() -> None:
            while len(received) < num_messages:
                data, ancillary, _, _ = self.theirs.recvmsg(1 << 16, 1024)
                for _, _, raw in ancillary:
                    descriptors.extend(array("i", raw))
                received.extend(reader.feed(data))

        await asyncio.to_thread(read)
        return received, descriptors


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    made = Ends()
    try:
        yield made
    finally:
        made.channel.close()
        made.theirs.close()


async def test_a_full_socket_keeps_the_rest_in_order() -> None:
    async with ends() as both:
        sent = [m.Freed([number] * 50) for number in range(5000)]
        for message in sent:
            both.channel.send(message)
        received, _ = await both.read_all(len(sent))
        assert received == sent


async def test_descriptors_arrive_with_their_messages_even_through_a_full_socket() -> None:
    async with ends() as both:
        for number in range(3000):
            both.channel.send(m.Freed([number] * 20))
        numbers = []
        for _ in range(3):
            read_end, write_end = os.pipe()
            os.close(write_end)
            numbers.append(os.fstat(read_end).st_ino)
            both.channel.send(m.Segment(True, 64), read_end)
        received, descriptors = await both.read_all(3003)
        assert [type(message) for message in received[-3:]] == [m.Segment] * 3
        assert [os.fstat(descriptor).st_ino for descriptor in descriptors] == numbers
        for descriptor in descriptors:
            os.close(descriptor)


async def test_a_closed_channel_closes_the_descriptors_that_it_could_not_send() -> None:
    async with ends() as both:
        for number in range(3000):
            both.channel.send(m.Freed([number] * 20))
        read_end, write_end = os.pipe()
        both.channel.send(m.Segment(True, 64), read_end)
        both.channel.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(read_end)
        os.close(write_end)


async def test_what_was_sent_before_the_end_is_heard_and_the_end_is_told_once() -> None:
    async with ends() as both:
        both.theirs.sendall(m.encode(m.Freed([1])) + m.encode(m.Freed([2])))
        both.channel.send(m.Freed([3]))  # never read: its end is a reset, not a plain one
        both.theirs.close()
        assert await asyncio.wait_for(both.end, 5) == "it closed its channel"
        assert both.messages == [m.Freed([1]), m.Freed([2])]
        both.channel.send(m.Freed([4]))  # to nobody: no error


async def test_nonsense_ends_the_channel() -> None:
    async with ends() as both:
        both.theirs.sendall(m.LENGTH.pack(4) + b"what")
        assert (await asyncio.wait_for(both.end, 5)).startswith("it sent something unintelligible")


# --- the worker's end


class WorkerEnd:
    def __init__(self) -> None:
        self.server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.messages: list[Any] = []
        self.channel = WorkerChannel(theirs, self.messages.append, lambda: None)

    def say(self, *messages: Any) -> None:
        self.server.sendall(b"".join(m.encode(message) for message in messages))

    def wait_for(self, count: int) -> None:
        assert self.channel.wait_until(lambda: len(self.messages) >= count, 5)


async def test_waiting_ends_with_the_message_that_it_was_for() -> None:
    worker = WorkerEnd()
    worker.say(m.Cancel(1, 0))
    worker.wait_for(1)
    assert not worker.channel.wait_until(lambda: len(worker.messages) >= 2, 0.01)


async def test_threads_that_wait_for_different_things_all_get_them() -> None:
    worker = WorkerEnd()
    threads = [threading.Thread(target=worker.wait_for, args=(count,)) for count in (5, 1, 3, 2, 4)]
    for thread in threads:
        thread.start()
    for number in range(5):
        worker.say(m.Cancel(number, 0))
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


async def test_polling_takes_what_is_there_and_does_not_wait() -> None:
    worker = WorkerEnd()
    worker.channel.poll()
    assert worker.messages == []
    worker.say(m.Cancel(1, 0), m.Cancel(2, 0))
    worker.channel.poll()
    assert len(worker.messages) == 2


async def test_a_thread_reads_for_those_who_neither_wait_nor_poll() -> None:
    worker = WorkerEnd()
    worker.channel.read_in_thread()
    worker.channel.read_in_thread()
    worker.say(m.Cancel(1, 0))
    worker.wait_for(1)
    worker.server.close()


async def test_the_end_is_an_exception_that_models_do_not_catch() -> None:
    worker = WorkerEnd()
    worker.server.close()
    with pytest.raises(ChannelClosed):
        worker.channel.wait_until(lambda: False)
    assert not issubclass(ChannelClosed, Exception)


async def test_a_block_is_waited_for_until_the_server_has_made_room() -> None:
    worker = WorkerEnd()

    def serve() -> None:
        reader = m.FrameReader(m.ToServer)
        [needed] = reader.feed(worker.server.recv(1 << 16))
        assert needed == m.NeedSegment(100)
        fd = make_segment("test", MIN_SEGMENT_BYTES)
        socket.send_fds(worker.server, [m.encode(m.Segment(True, MIN_SEGMENT_BYTES))], [fd])
        os.close(fd)

    server = threading.Thread(target=serve)
    server.start()
    block, memory = worker.channel.allocate(100)
    server.join()
    assert (block >= 0, memory.nbytes) == (True, 100)


async def test_blocks_that_the_server_has_read_are_used_again() -> None:
    worker = WorkerEnd()
    fd = make_segment("test", MIN_SEGMENT_BYTES)
    worker.channel.outgoing.add(Segment(fd, MIN_SEGMENT_BYTES))
    os.close(fd)
    block, _ = worker.channel.allocate(MIN_SEGMENT_BYTES)
    worker.say(m.Freed([block]), m.Cancel(1, 0))
    worker.wait_for(1)
    assert worker.channel.allocate(MIN_SEGMENT_BYTES)[0] == block
