"""The table of v2 routes over HTTP: which path, which methods, which handler."""

from __future__ import annotations

from enginehouse.core import Core
from enginehouse.frontends.http_message import TEXT
from enginehouse.frontends.http_routes import Route, RouteHandler, Router
from enginehouse.frontends.kserve_http.generate import GenerateHandler
from enginehouse.frontends.kserve_http.infer import InferHandler
from enginehouse.frontends.kserve_http.models import ModelHandlers
from enginehouse.frontends.kserve_http.repository import RepositoryHandlers
from enginehouse.frontends.kserve_http.settings import SettingHandlers
from enginehouse.frontends.kserve_http.shared_memory import SharedMemoryHandlers
from enginehouse.frontends.request_parameters import HeaderForwarding
from enginehouse.frontends.request_traces import RequestTraces
from enginehouse.frontends.restricted_apis import Api, RestrictedApis
from enginehouse.frontends.shared_memory.regions import Regions
from enginehouse.frontends.tenants import TenantHeader
from enginehouse.options import ServerOptions

GET, POST = ("GET",), ("POST",)
MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[0-9]+))?"
REPOSITORY = r"/v2/repository(?:/(?P<repository>[^/]+))?"
REGION = r"(?:/region/(?P<region>[^/]+))?/(?P<action>status|register|unregister)"


class V2Handlers:
    """The handlers of inference, for routes of other names too."""

    def __init__(self, core: Core, options: ServerOptions, regions: Regions) -> None:
        forwarding, traces = HeaderForwarding(options.http_header_forward_pattern), RequestTraces(core, "HTTP")
        tenants = TenantHeader.of(options.tenant_header)
        generate = GenerateHandler(core, forwarding, tenants, traces)
        self.inference = InferHandler(core, regions, forwarding, tenants, traces, options.http_max_input_size)
        self.infer: RouteHandler = self.inference.handle
        self.generate: RouteHandler = generate.generate
        self.generate_stream: RouteHandler = generate.generate_stream


def v2_routes(core: Core, options: ServerOptions, regions: Regions) -> list[Route]:
    models, repository = ModelHandlers(core), RepositoryHandlers(core)
    settings, memory = SettingHandlers(core), SharedMemoryHandlers(regions)
    inference = V2Handlers(core, options, regions)
    fast = inference.inference.begin
    return [
        Route(MODEL + "/infer", POST, Api.INFERENCE, inference.infer, not_allowed_type=TEXT, fast=fast),
        Route(MODEL + "/generate", POST, Api.INFERENCE, inference.generate),
        Route(MODEL + "/generate_stream", POST, Api.INFERENCE, inference.generate_stream),
        Route("/v2/health/live", GET, Api.HEALTH, models.live, TEXT, TEXT),
        Route("/v2/health/ready", GET, Api.HEALTH, models.ready, TEXT, TEXT),
        Route(MODEL + "/ready", GET, Api.HEALTH, models.model_ready, TEXT, TEXT),
        Route("/v2", GET, Api.METADATA, models.server_metadata),
        Route("/v2/models/stats", GET, Api.STATISTICS, models.statistics),
        Route(MODEL, GET, Api.METADATA, models.metadata),
        Route(MODEL + "/config", GET, Api.MODEL_CONFIG, models.config),
        Route(MODEL + "/stats", GET, Api.STATISTICS, models.statistics),
        Route("/v2/models/(?P<model>[^/]+)/trace/setting", GET + POST, Api.TRACE, settings.trace),
        Route("/v2/trace/setting", GET + POST, Api.TRACE, settings.trace),
        Route("/v2/logging", GET + POST, Api.LOGGING, settings.logs),
        Route(REPOSITORY + "/index", POST, Api.MODEL_REPOSITORY, repository.index),
        Route(REPOSITORY + "/models/(?P<model>[^/]+)/load", POST, Api.MODEL_REPOSITORY, repository.load),
        Route(REPOSITORY + "/models/(?P<model>[^/]+)/unload", POST, Api.MODEL_REPOSITORY, repository.unload),
        Route("/v2/systemsharedmemory" + REGION, GET + POST, Api.SHARED_MEMORY, memory.system),
        Route("/v2/cudasharedmemory" + REGION, GET + POST, Api.SHARED_MEMORY, memory.cuda),
    ]


def v2_router(core: Core, options: ServerOptions, regions: Regions) -> Router:
    return Router(v2_routes(core, options, regions), RestrictedApis(options.http_restricted_api))
