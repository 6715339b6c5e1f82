"""One relayed call under admission."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from neo_common.errors import Reason, ServiceError
from neo_common.grpc.principal import current
from router.admission import cost
from router.admission.gate import Admission
from router.relay import Context, Failure, Send


async def admitted(
    admission: Admission,
    path: str,
    request: bytes,
    context: Context,
    send: Send,
    relay: Callable[[Send], Awaitable[Failure | None]],
) -> Failure | None:
    """`relay(send)` once the request may run; its use is settled by what the answer says. Raises
    ServiceError."""
    if not admission.on or path not in cost.KINDS:
        return await relay(send)
    try:
        asked = cost.asked(path, request, context.invocation_metadata(), admission.policy.shared)
    except ValueError as error:
        raise ServiceError(Reason.INVALID_ARGUMENT, str(error), field="metadata") from None
    last = b""

    async def keep(message: bytes) -> None:
        nonlocal last
        last = message
        await send(message)

    async with admission.admit(
        current(), asked.priority, asked.cost, context.time_remaining(), len(request)
    ) as permit:
        try:
            failure = await relay(keep)
        except ServiceError:
            if not last:
                permit.settle(0.0)
            raise
        if not last:
            permit.settle(0.0)  # refused, or never reached a backend
        elif failure is None:
            permit.settle(cost.used(path, asked.cost.choices, last))
        return failure
