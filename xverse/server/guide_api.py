"""THE PUBLISHED SERVICE. POST / with {"prompt"}, exactly {"response", "status", "time"} back."""

from datetime import datetime

from starlette.responses import Response

from xverse.engine.request import Sampling
from xverse.server.context import Context
from xverse.server.refusals import json_response
from xverse.server.schema import GuideRequest
from xverse.server.turns import Turn, whole


async def answer(context: Context, asked: GuideRequest) -> Response:
    """The prompt taken as a message of the user's, and what the model says to it."""
    service = context.service
    ids = await service.render([{"role": "user", "content": asked.prompt}], None)
    prompt = service.prompt(ids, Sampling(), "prompt")
    work = whole(service, context.tenant, Turn([prompt]), context.facts)
    (found,) = await context.attend(work)
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return json_response({"response": found.content, "status": 200, "time": now})
