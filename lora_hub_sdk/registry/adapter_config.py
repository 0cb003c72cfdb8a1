"""adapter_config.json as PEFT writes it, read once at the border into something that can be trusted.

Whatever would change an adapter's answers and is not served exactly is refused here by name; a field that this version
does not know and that is switched on is refused too, since dropping it silently is how others go wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from lora_hub_sdk.errors import InvalidConfigError, MissingConfigError, UnsupportedFeatureError

_Number = TypeVar("_Number", int, float)

CONFIG_FILE: Final = "adapter_config.json"
_MAX_CONFIG_BYTES: Final = 1_000_000

#: Fields that say how the adapter was trained, or which modules it has (the tensors themselves tell that better).
_HARMLESS: Final = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type",
        "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "init_lora_weights", "megatron_core", "qalora_group_size", "eva_config", "bias", "runtime_config",
    }
)  # fmt: skip
#: Initialisations that leave the base model's weights alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not.
_SAFE_INITS: Final = ("gaussian", "eva", "orthogonal")
#: How a feature is switched off.
_OFF: Final[tuple[object, ...]] = (None, False, "", "none", {}, [])


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of the configuration that decides the numbers.

    ``base_model`` is the name as it stands in the file, "" where there is none. Patterns map a module path, or the
    end of one, to its own rank or alpha; the first that matches wins, as in PEFT.
    """

    base_model: str
    r: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        """The configured rank of a module."""
        return _first_match(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """s of the delta s * B A at a module: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        rank = self.rank(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_adapter_config(folder: Path, source: str) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        MissingConfigError: there is none.
        InvalidConfigError: it cannot be parsed, or a value makes no sense.
        UnsupportedFeatureError: a feature that cannot be served exactly yet, by name.
    """
    return adapter_config_from_bytes(read_config_bytes(folder, source), source)


def read_config_bytes(folder: Path, source: str) -> bytes:
    """The bytes of ``adapter_config.json``, for those who need its digest too.

    Raises:
        MissingConfigError, InvalidConfigError: there is none, or one of a size that no configuration has.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise MissingConfigError(source, f"there is no {CONFIG_FILE}; is it a PEFT adapter?")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise InvalidConfigError(source, f"{CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES} bytes")
    return path.read_bytes()


def adapter_config_from_bytes(content: bytes, source: str) -> AdapterConfig:
    """As ``read_adapter_config``, from the file's content."""
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidConfigError(source, f"{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidConfigError(source, f"{CONFIG_FILE} holds a {type(raw).__name__}, expected an object")
    return parse_adapter_config(raw, source)


def parse_adapter_config(raw: Mapping[str, Any], source: str) -> AdapterConfig:
    """As ``read_adapter_config``, from the parsed JSON."""
    _refuse_unsupported(raw, source)
    base = raw.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise InvalidConfigError(source, f"base_model_name_or_path is {base!r}, expected a name")
    return AdapterConfig(
        base_model=base,
        r=_rank(raw.get("r"), "r", source),
        alpha=_alpha(raw.get("lora_alpha"), "lora_alpha", source),
        use_rslora=raw.get("use_rslora") is True,
        rank_pattern={
            _pattern(key, "rank_pattern", source): _rank(value, f"rank_pattern[{key!r}]", source)
            for key, value in _mapping(raw, "rank_pattern", source).items()
        },
        alpha_pattern={
            _pattern(key, "alpha_pattern", source): _alpha(value, f"alpha_pattern[{key!r}]", source)
            for key, value in _mapping(raw, "alpha_pattern", source).items()
        },
    )


def _refuse_unsupported(raw: Mapping[str, Any], source: str) -> None:
    if raw.get("peft_type") != "LORA":
        raise UnsupportedFeatureError(source, "peft_type", raw.get("peft_type"))
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedFeatureError(source, "task_type", raw.get("task_type"))
    if raw.get("bias", "none") not in (None, "none"):
        raise UnsupportedFeatureError(source, "bias", raw["bias"])
    init = raw.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _SAFE_INITS):
        raise UnsupportedFeatureError(source, "init_lora_weights", init)
    for name in sorted(raw.keys() - _HARMLESS):
        if raw[name] not in _OFF:
            raise UnsupportedFeatureError(source, name, raw[name])


def _rank(value: object, name: str, source: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidConfigError(source, f"{name} is {value!r}, expected a whole number of 1 or more")
    return value


def _alpha(value: object, name: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidConfigError(source, f"{name} is {value!r}, expected a finite number")
    return float(value)


def _mapping(raw: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise InvalidConfigError(source, f"{name} is a {type(value).__name__}, expected an object")
    return value


def _pattern(key: str, name: str, source: str) -> str:
    """A pattern key without its escapes. PEFT reads keys as regular expressions; a stranger's never run here."""
    literal = key.replace(r"\.", ".").removesuffix("$")
    if not re.fullmatch(r"\^?[\w.\-]+", literal):
        raise UnsupportedFeatureError(source, f"{name} with a regular expression", key)
    return literal


def _first_match(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    for key, value in patterns.items():
        if key.startswith("^"):
            if module == key[1:]:
                return value
        elif module == key or module.endswith(f".{key}"):
            return value
    return default
