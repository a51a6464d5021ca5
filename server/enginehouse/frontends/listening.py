"""Where front ends listen: TCP addresses and UNIX sockets, in the clear or over TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from enginehouse.errors import InvalidArgument, Unavailable

UNIX = "unix:"
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files. With `root`, clients are asked for a certificate that one of those in it has signed."""

    server: str
    key: str
    root: str = ""

    def context(self, protocol: str) -> ssl.SSLContext:
        """For a server of that ALPN protocol. Raises InvalidArgument for files that are missing or no certificates."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([protocol])
        try:
            context.load_cert_chain(self.server, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument(
                f"can't take certificate '{self.server}' and key '{self.key}' for TLS: {_why(error)}"
            ) from None
        if self.root:
            try:
                context.load_verify_locations(self.root)
            except (OSError, ssl.SSLError) as error:
                raise InvalidArgument(f"can't take root certificates '{self.root}' for TLS: {_why(error)}") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _why(error: OSError) -> str:
    """SSLError is an OSError whose `strerror` is a code of OpenSSL's."""
    return str(error) if isinstance(error, ssl.SSLError) else str(error.strerror)


async def listen(
    connect: Callable[[], asyncio.BaseProtocol],
    service: str,
    address: str,
    port: int,
    *,
    reuse_port: bool = False,
    tls: ssl.SSLContext | None = None,
) -> asyncio.Server:
    """`address` may be `unix:<path>`. Raises Unavailable if it is taken; `service` is for the message."""
    loop = asyncio.get_running_loop()
    try:
        if address.startswith(UNIX):
            path = address.removeprefix(UNIX)
            _remove_dead_socket(Path(path))
            return await loop.create_unix_server(connect, path, ssl=tls, backlog=_BACKLOG)
        return await loop.create_server(
            connect, address, port, reuse_port=reuse_port or None, ssl=tls, backlog=_BACKLOG
        )
    except OSError as error:
        raise Unavailable(
            f"failed to start {service} service: Unavailable - Socket '{socket_name(address, port)}' "
            f"already in use ({error.strerror})"
        ) from None


def socket_name(address: str, port: int) -> str:
    return address if address.startswith(UNIX) else f"{address}:{port}"


def port_of(server: asyncio.Server, asked: int) -> int:
    """The real one where 0 was asked for."""
    name = server.sockets[0].getsockname()
    return int(name[1]) if isinstance(name, tuple) else asked


def _remove_dead_socket(path: Path) -> None:
    """What a server that was killed has left; one that is alive answers, and binding then fails."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
