"""HOW IT IS. Health, readiness, metrics, and the models that are served."""

from typing import Any

from starlette.responses import Response

from xverse.server.context import Context
from xverse.server.refusals import json_response, not_ready


async def health(context: Context) -> Response:
    """The API process answers, whatever its engine does."""
    return json_response({"status": "alive"})


async def ready(context: Context) -> Response:
    """Whether requests can be answered now."""
    state = "draining" if context.traffic.draining else context.service.supervisor.state
    if state != "ready":
        raise not_ready(state)
    return json_response({"status": "ready"})


async def metrics(context: Context) -> Response:
    """All metrics as Prometheus reads them."""
    service = context.service
    service.metrics.waiting.set(service.supervisor.load.waiting + service.queue.waiting)
    service.metrics.queued_now.set(service.queue.waiting)
    service.metrics.slots_used.set(service.queue.used)
    service.metrics.engine.set_restarts(service.supervisor.restarts)
    service.metrics.ready.set(service.supervisor.link is not None)
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(context: Context) -> Response:
    """The models served: one, and its adapters."""
    data = [_model(context, name) for name in context.service.models.names]
    return json_response({"object": "list", "data": data})


async def model(context: Context) -> Response:
    """The one that is named in the path, if it is served."""
    name = context.request.path_params["model"]
    context.service.models.require(name)
    return json_response(_model(context, name))


def _model(context: Context, name: str) -> dict[str, Any]:
    models = context.service.models
    entry = models.adapters.get(name)
    return {
        "id": name,
        "object": "model",
        "created": models.created if entry is None else entry.created,
        "owned_by": "xverse",
        "max_model_len": context.service.context,
        "parent": None if entry is None else models.name,
    }
