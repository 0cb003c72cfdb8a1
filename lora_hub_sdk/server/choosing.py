"""From the field ``model``, and the fields beside it, to a base model and a routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lora_hub_sdk.faces.adapter_facts import shown_name
from lora_hub_sdk.models.names import canonical_name
from lora_hub_sdk.server.fields import Chosen
from lora_hub_sdk.server.refusals import Refusal, Refused
from lora_hub_sdk.server.settings import ServerSettings
from lora_hub_sdk.types import Routing

AUTO: Final = "auto"
BASE: Final = "base"


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``hub.generate`` is asked."""

    base_model: str | None
    routing: Routing
    #: Whether ``model`` was taken for an adapter's name.
    named: bool = False


class Chooser:
    """Reads the fields of requests, each for its caller's namespace."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        base = settings.base_model
        #: By which names the base model may be asked for.
        self.base_name = None if base is None else shown_name(canonical_name(base))
        self._base_names = {BASE} if base is None else {BASE, shown_name(base), shown_name(canonical_name(base))}

    def chosen(self, body: Chosen, namespace: str) -> Choice:
        """The base model and the routing that a request asks for.

        Raises:
            Refused: fields that contradict one another, or the model "base" of a server that has no base model.
        """
        settings, model = self._settings, body.model
        strategy, adapters, named = body.strategy, body.adapters, False
        for field, count in (("k", body.k or 0), ("adapters", len(adapters or ()))):
            if count > settings.max_k:
                raise _bad(field, f"{field}: {count} are more than {settings.max_k}, the most adapters of a route here")
        if model in self._base_names:
            if adapters or strategy not in (None, BASE):
                raise _bad("model", f"model {model!r} answers by itself; leave out adapters and strategy")
            return self.of_base(self._settings.base_model, namespace)
        if model.startswith(f"{AUTO}:"):
            asked = model.removeprefix(f"{AUTO}:")
            if strategy not in (None, asked):
                raise _bad("strategy", f"strategy {strategy!r} contradicts model {model!r}; leave one of them out")
            strategy = asked
        elif model != AUTO:
            if adapters:
                raise _bad("adapters", f"model {model!r} is one adapter; with adapters, ask for model 'auto'")
            adapters, named = [model], True
        routing = Routing(
            strategy or settings.strategy,
            body.k or settings.k,
            body.weights or settings.weights,
            settings.min_score if body.min_score is None else body.min_score,
            None if adapters is None else tuple(adapters),
            tuple(body.exclude or ()),
            namespace,
            tuple(body.tags or ()),
            rerank=body.rerank,
        )
        return Choice(settings.base_model, routing, named)

    def is_base(self, name: str) -> bool:
        """Whether that is a name of this server's base model."""
        return name in self._base_names

    def of_base(self, base_model: str | None, namespace: str) -> Choice:
        """A base model alone.

        Raises:
            Refused: there is none.
        """
        if base_model is None:
            raise _bad("model", "this server has a base model for each adapter, so 'base' does not tell which; name it")
        return Choice(base_model, Routing(BASE, namespace=namespace))


def _bad(param: str, message: str) -> Refused:
    return Refused(Refusal(400, message, code="invalid_value", param=param))
