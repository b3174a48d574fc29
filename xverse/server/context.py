"""HTTP REQUEST -> ITS PARTS. What a route needs of the request that it answers."""

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from starlette.requests import Request

from xverse.server.gate import Traffic
from xverse.server.limits import Tenant
from xverse.server.presence import while_there
from xverse.server.service import Service

Result = TypeVar("Result")


@dataclass(frozen=True)
class Context:
    """Who asks, what the log will be told, and the service that answers."""

    service: Service
    traffic: Traffic
    request: Request
    max_choices: int

    @property
    def tenant(self) -> Tenant:
        """Whose key it was."""
        return cast(Tenant, self.request.state.tenant)

    @property
    def facts(self) -> dict[str, object]:
        """Numbers for the log."""
        return cast(dict[str, object], self.request.state.facts)

    async def attend(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do the work while the client is there."""
        return await while_there(self.request.receive, work)
