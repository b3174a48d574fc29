"""HTTP REQUEST -> ITS PARTS. What a route needs of the request that it answers."""

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from starlette.requests import Request

from xverse.server.gate import Traffic
from xverse.server.limits import Tenant
from xverse.server.presence import while_there
from xverse.server.refusals import draining
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

    def admit(self) -> None:
        """Count a request to the model; Refusal where none is taken, or the key has had its share.

        What the pages ask of themselves is not counted: what they ask of the model comes here.
        """
        if self.traffic.draining:
            raise draining()
        self.tenant.count_request()

    async def attend(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do the work while the client is there."""
        return await while_there(self.request.receive, work)
