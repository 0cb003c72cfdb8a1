"""How a server answers, whom it lets in, and how much each may ask."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lora_hub_sdk.composition.strategies import check_routing
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.models.names import SMOLLM2
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Routing

if TYPE_CHECKING:
    from lora_hub_sdk.engine.base_model import DType, ModelSettings, Quantization

Auth = Literal["keys", "none"]
#: A template's name; "none" is ``template=None``, the prompt as it is.
TemplateName = Literal["auto", "chat", "alpaca", "adapter", "none"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What ``create_app`` is made with.

    Attributes:
        base_model: the one that answers; None leaves it to each prompt's nearest adapter.
        dtype, device, quantization: how base models are loaded.
        strategy, k, weights, min_score, template: of requests that do not say.
        namespace: of everybody, where there are no keys; a key brings its own.
        auth: "keys" asks for API keys; "none" lets everybody in, who then must be on this machine.
        open_to_all: lets everybody in with ``auth="none"`` from other machines too, to ask and to read.
        max_body_bytes: longer bodies are refused while they are read.
        max_prompts: of one request to ``/v1/completions``.
        new_tokens: the longest answer where a request does not say.
        max_new_tokens: the longest answer that can be asked for.
        max_k: the most adapters that one route can be asked to have.
        timeout_s: for an answer, routing and loading included.
        body_s: for a body to come in.
        requests_per_minute, concurrent_per_key: each caller's share; None for no bound.
        drain_s: how long running requests may take once the server was told to stop.

    Raises:
        ConfigurationError, UnknownStrategyError: values that no request could be answered with.
    """

    base_model: str | None = SMOLLM2.name
    dtype: DType = "auto"
    device: str = "auto"
    quantization: Quantization | None = None
    strategy: str = "mixture"
    k: int = 3
    weights: str = "uniform"
    min_score: float | Literal["auto"] | None = None
    template: TemplateName = "auto"
    namespace: str = DEFAULT_NAMESPACE
    auth: Auth = "keys"
    open_to_all: bool = False
    max_body_bytes: int = 4 << 20
    max_prompts: int = 64
    new_tokens: int = 256
    max_new_tokens: int = 4096
    max_k: int = 32
    timeout_s: float = 300.0
    body_s: float = 30.0
    requests_per_minute: int | None = None
    concurrent_per_key: int | None = None
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompts", "new_tokens", "max_new_tokens", "max_k"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name in ("timeout_s", "body_s", "drain_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name}={getattr(self, name)}: expected seconds above 0")
        for name, choices in (("auth", get_args(Auth)), ("template", get_args(TemplateName))):
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}")
        check_routing(Routing(self.strategy, self.k, self.weights, self.min_score))

    @property
    def model(self) -> ModelSettings:
        """How base models are loaded."""
        from lora_hub_sdk.engine.base_model import ModelSettings

        return ModelSettings(self.dtype, self.device, self.quantization)

    def check_host(self, host: str) -> None:
        """Refuse an address that would let strangers in without keys.

        Raises:
            ConfigurationError: names the ways out.
        """
        if self.auth == "none" and not self.open_to_all and not is_loopback(host):
            raise ConfigurationError(
                f"host {host!r} can be reached from other machines, and auth='none' asks nobody for a key; use "
                "auth='keys', listen on 127.0.0.1, or say open_to_all"
            )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
