"""The front ends of a server as things that start and stop; `app.py` composes them.

Each listens on one port. Shared memory is registered on one protocol and used on the other, so they share
the regions.
"""

from __future__ import annotations

from typing import Protocol

from enginehouse.core import Core
from enginehouse.frontends.access import guarded
from enginehouse.frontends.cloud.sagemaker import SageMaker
from enginehouse.frontends.cloud.vertex_ai import VertexAI
from enginehouse.frontends.console import Console
from enginehouse.frontends.http2_transport import Http2GrpcServer
from enginehouse.frontends.http_message import TEXT, HttpRequest, HttpResponse, Reply
from enginehouse.frontends.http_routes import PathParts, Route, Router
from enginehouse.frontends.http_transport import HttpServer, no_answer
from enginehouse.frontends.kserve_grpc.health import HealthMethods
from enginehouse.frontends.kserve_grpc.methods import v2_methods
from enginehouse.frontends.kserve_grpc.reflection import ReflectionMethods, reflection_pool
from enginehouse.frontends.kserve_http.front_end import V2Handlers, v2_routes
from enginehouse.frontends.kserve_http.infer import JSON_ALLOWANCE
from enginehouse.frontends.listening import Certificates
from enginehouse.frontends.openai.errors import refuse_length
from enginehouse.frontends.openai.front_end import OpenAIFrontEnd
from enginehouse.frontends.restricted_apis import RestrictedApis
from enginehouse.frontends.shared_memory.regions import Regions
from enginehouse.options import ServerOptions

METRICS_TYPE = "text/plain; charset=utf-8"


class FrontEnd(Protocol):
    """`port` is the real one after `start`, also where 0 was asked for."""

    port: int

    async def start(self) -> None:
        """Listens. Raises Unavailable if the address is taken."""
        ...

    async def stop(self, grace_s: float = 5.0) -> None:
        """Takes no new connections; requests in flight have so long to end."""
        ...


def make_regions(options: ServerOptions) -> Regions:
    """One for a server, given to both protocols' front ends."""
    return Regions(allowed=options.allow_client_shm)


def http_certificates(options: ServerOptions) -> Certificates | None:
    if not options.http_use_ssl:
        return None
    root = options.http_root_cert if options.http_use_ssl_mutual else ""
    return Certificates(options.http_server_cert, options.http_server_key, root)


def serve_http(core: Core, options: ServerOptions, regions: Regions) -> FrontEnd:
    routes = v2_routes(core, options, regions)
    openai = OpenAIFrontEnd(core, options) if options.allow_openai and options.openai_port is None else None
    if openai is not None:
        routes += openai.routes()
    if options.allow_console:
        routes += Console(core).routes()
    router = Router(routes, RestrictedApis(options.http_restricted_api))
    return HttpServer(
        guarded(router.handle, options),
        "HTTP",
        options.http_address,
        options.http_port,
        max_body_bytes=JSON_ALLOWANCE * options.http_max_input_size,
        reuse_port=options.reuse_http_port,
        certificates=http_certificates(options),
        refuse_large=None if openai is None else openai.refuse_large,
        refuse_length=no_answer if openai is None else refuse_length,
    )


def serve_openai(core: Core, options: ServerOptions, port: int) -> FrontEnd:
    """On a port of its own."""
    openai = OpenAIFrontEnd(core, options)
    routes = [*openai.routes(), metrics_route(core)]
    return HttpServer(
        guarded(Router(routes, RestrictedApis(())).handle, options),
        "OpenAI",
        options.openai_host,
        port,
        max_body_bytes=options.http_max_input_size,
        certificates=http_certificates(options),
        refuse_large=openai.refuse_large,
        refuse_length=refuse_length,
    )


def serve_grpc(core: Core, options: ServerOptions, regions: Regions) -> FrontEnd:
    methods = v2_methods(core, options, regions) | HealthMethods(core).methods()
    pool = reflection_pool()
    return Http2GrpcServer(methods | ReflectionMethods(pool).methods(), options)


def serve_sagemaker(core: Core, options: ServerOptions, regions: Regions) -> FrontEnd:
    inference = V2Handlers(core, options, regions)
    handlers = {
        "infer": inference.infer,
        "generate": inference.generate,
        "generate_stream": inference.generate_stream,
    }
    router = Router(SageMaker(core, handlers).routes(), RestrictedApis(options.http_restricted_api))
    return HttpServer(
        guarded(router.handle, options),
        "SageMaker",
        options.http_address,
        options.sagemaker_port,
        max_body_bytes=JSON_ALLOWANCE * options.http_max_input_size,
    )


def serve_vertex_ai(core: Core, options: ServerOptions, regions: Regions) -> FrontEnd:
    routes = [*v2_routes(core, options, regions), metrics_route(core)]
    router = Router(routes, RestrictedApis(options.http_restricted_api))
    vertex_ai = VertexAI(core, router, options.vertex_ai_default_model)
    return HttpServer(
        guarded(vertex_ai.handle, options, vertex_ai.health_route),
        "Vertex AI",
        options.http_address,
        options.vertex_ai_port,
        max_body_bytes=JSON_ALLOWANCE * options.http_max_input_size,
    )


def metrics_route(core: Core) -> Route:
    async def metrics(http: HttpRequest, parts: PathParts) -> Reply:
        text: bytes = await core.metrics.scrape()
        return HttpResponse(200, METRICS_TYPE, (text,))

    return Route("/metrics", ("GET",), None, metrics, not_allowed_type=TEXT)


def serve_metrics(core: Core, options: ServerOptions) -> FrontEnd:
    async def nothing(http: HttpRequest, parts: PathParts) -> Reply:
        return HttpResponse(200, METRICS_TYPE)  # as Triton answers any other path here

    routes = [metrics_route(core), Route(".*", ("GET",), None, nothing, not_allowed_type=TEXT)]
    router = Router(routes, RestrictedApis(()))
    return HttpServer(router.handle, "Metrics", options.metrics_host, options.metrics_port)


def front_ends(core: Core, options: ServerOptions) -> list[FrontEnd]:
    """All that the options ask for, not started yet."""
    regions = make_regions(options)
    chosen: list[FrontEnd] = []
    if options.allow_grpc:
        chosen.append(serve_grpc(core, options, regions))
    if options.allow_http:
        chosen.append(serve_http(core, options, regions))
    if options.allow_openai and options.openai_port is not None:
        chosen.append(serve_openai(core, options, options.openai_port))
    if options.allow_sagemaker:
        chosen.append(serve_sagemaker(core, options, regions))
    if options.allow_vertex_ai:
        chosen.append(serve_vertex_ai(core, options, regions))
    if options.allow_metrics:
        chosen.append(serve_metrics(core, options))
    return chosen
