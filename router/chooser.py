"""From a call to a backend: which serve its model, which policy says, what it may know."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence

from neo_common.errors import Reason, ServiceError
from router.keys import CallKeys
from router.policies import BY_PREFIX, POLICIES, Policy, choose
from router.policies.wait import predicted_wait
from router.prefixes import PrefixIndex, names_of
from router.views import BackendView, CallView

NAMES = {policy: name for name, policy in POLICIES.items()}
Served = Sequence[tuple[tuple[str, ...], BackendView]]
"""Each backend and the models that it serves; no models: it has not said."""


class Chooser:
    """One router's choices; used by one event loop.

    policy: for models that `by_model` does not name. default_model: for calls that name none; ""
    means the only one there is. chosen: told of each choice, with the policy's name, what became of
    the prompt's affinity (`free` where there is none, `new`, `kept`, `moved`), and the wait in
    seconds that is predicted.
    """

    def __init__(
        self,
        policy: Policy,
        by_model: Mapping[str, Policy] | None = None,
        default_model: str = "",
        *,
        draw: Callable[[], float] = random.random,
        chosen: Callable[[str, str, float], None] = lambda policy, how, wait: None,
    ) -> None:
        self._policy = policy
        self._by_model = by_model or {}
        self._default_model = default_model
        self._draw = draw
        self._chosen = chosen
        self._turn = 0
        self._index = PrefixIndex()

    def choose(
        self,
        served: Served,
        keys: CallKeys,
        tried: Collection[str] = (),
        *,
        with_room: bool = False,
    ) -> str | None:
        """The address, None when there is none to try (with room in its queue, if need be). Raises
        ServiceError when no backend has the call's model."""
        views, model = self._serving(served, keys.model)
        policy = self._by_model.get(model, self._policy)
        self._turn += 1
        # Ties go to the first: let each be it in turn.
        turn = self._turn % max(1, len(views))
        names = names_of(keys.prompt, model) if policy in BY_PREFIX else ()
        call = CallView(
            prompt_tokens=keys.prompt_tokens,
            session=keys.session,
            prefix=names,
            known=self._index.known(names),
            turn=self._turn,
            chance=self._draw(),
        )
        address = choose(policy, views[turn:] + views[:turn], call, tried, with_room=with_room)
        if address is None:
            return None
        if names:
            self._index.record(names, address)
        (view,) = (view for view in views if view.address == address)
        self._chosen(NAMES.get(policy, ""), _how(call, address), predicted_wait(view, call))
        return address

    def _serving(self, served: Served, model: str) -> tuple[list[BackendView], str]:
        """The backends that have it, and its name. One that has not said what it serves is asked
        only where nobody has said so: it may be of an older version."""
        names = sorted({name for models, _ in served for name in models})
        model = model or self._default_model
        if not names:
            return [view for _, view in served], model
        if not model:
            if len(names) > 1:
                raise _unknown("model is missing", names)
            model = names[0]
        views = [view for models, view in served if model in models]
        if not views:
            views = [view for models, view in served if not models]
        if not views:
            raise _unknown(f"model {model!r} is not served here", names)
        return views, model


def _how(call: CallView, address: str) -> str:
    """What became of the affinity of the prompt's beginning."""
    last = next((known for known in reversed(call.known) if known), "")
    if not call.prefix:
        return "free"
    return "kept" if address == last else "moved" if last else "new"


def _unknown(what: str, names: Sequence[str]) -> ServiceError:
    shown = ", ".join(names)
    return ServiceError(Reason.UNKNOWN_MODEL, f"{what}; there are {shown}", field="model")
