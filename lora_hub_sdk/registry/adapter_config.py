"""adapter_config.json as PEFT writes it, read once at the border into something that can be trusted.

Whatever would change an adapter's answers and is not served exactly is refused here by name; a field that this version
does not know and that is switched on is refused too, since dropping it silently is how others go wrong. A stranger's
regular expression is never compiled, and nothing of his stands in a message uncut.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar

from lora_hub_sdk.errors import InvalidConfigError, MissingConfigError, UnsupportedFeatureError

_Number = TypeVar("_Number", int, float)

CONFIG_FILE: Final = "adapter_config.json"
_MAX_CONFIG_BYTES: Final = 1_000_000
_MAX_DIGITS: Final = {int: 18, float: 64}
_MAX_LEVELS: Final = 16
_MAX_NAMES: Final = 20_000
_MAX_TEXT: Final = 10_000
_MAX_BASE: Final = 1_000
#: What the base's weights lost before training. CorDA, LoftQ and LoRA-GA take what no config tells.
Init = Literal["plain", "pissa", "olora"]
#: Initialisations by what they leave of the base's weights: "plain" is all.
_INITS: Final[Mapping[object, Init]] = {
    None: "plain",
    True: "plain",
    False: "plain",
    "gaussian": "plain",
    "eva": "plain",
    "orthogonal": "plain",
    "mica": "plain",
    "pissa": "pissa",
    "olora": "olora",
}
_BIASES: Final = (None, "none", "all", "lora_only")
#: How a feature is switched off.
_OFF: Final[tuple[object, ...]] = (None, False, "", "none", {}, [])
_PATH: Final = re.compile(r"[/\\.~]|[A-Za-z]:")


# -- what a stranger may write ---------------------------------------------------------------------------------


def shown(value: object) -> str:
    """How a stranger's value stands in a message: ASCII, on one line, cut where it is long."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:120]}... ({len(text)} characters)"


def printable(text: str) -> str:
    """A stranger's name or message as it is, where it is short and plain, else as ``shown``."""
    return text if text.isascii() and text.isprintable() and len(text) <= 200 else shown(text)


def strict_json(content: bytes) -> object:
    """JSON that every reader takes for the same thing.

    UTF-8 without a byte order mark, no field twice, neither NaN nor infinity, numbers of ordinary length, few levels.

    Raises:
        ValueError: it is anything else.
    """
    try:
        value: object = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_each_once,
            parse_constant=_no_number,
            parse_int=lambda digits: int(_ordinary(digits, int)),
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    level = [value]
    for _ in range(_MAX_LEVELS):
        level = [child for parent in level if isinstance(parent, dict | list) for child in _children(parent)]
    if level:
        raise ValueError(f"it nests deeper than {_MAX_LEVELS} levels")
    return value


def unsupported(source: str, feature: str, found: object) -> UnsupportedFeatureError:
    """The refusal of a feature, with names and values that are fit to be printed."""
    return UnsupportedFeatureError(source, printable(feature), _Shown(shown(found)))


def read_regular(path: Path, most: int) -> bytes:
    """At most so many bytes of a regular file.

    Raises:
        OSError: there is none, it cannot be read, or it is a pipe, a folder or a device. None of them blocks.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


class _Shown(str):
    """Text that is its own repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} stands in it twice, and readers differ in which one counts")
        found[name] = value
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _ordinary(digits: str, kind: type) -> str:
    if len(digits) > _MAX_DIGITS[kind]:
        raise ValueError(f"a number of {len(digits)} characters")
    return digits


def _finite(digits: str) -> float:
    value = float(_ordinary(digits, float))
    if math.isinf(value):
        raise ValueError(f"{digits} is beyond every number")
    return value


def _children(value: dict[str, object] | list[object]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


# -- types of the fields that are understood, or that do not matter -------------------------------------------------


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _is_object(value: object) -> bool:
    return isinstance(value, dict) and len(value) <= _MAX_NAMES


def _is_names(value: object) -> bool:
    return _is_text(value) or (isinstance(value, list) and len(value) <= _MAX_NAMES and all(map(_is_text, value)))


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and "" not in value and _is_names(value)


def _is_layers(value: object) -> bool:
    return _is_count(value) or (isinstance(value, list) and len(value) <= _MAX_NAMES and all(map(_is_count, value)))


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_init(value: object) -> bool:
    return isinstance(value, bool) or _is_text(value)


def _is_anything(value: object) -> bool:
    return True


#: Fields that decide the numbers, and those that only say how the adapter was trained: null, or what fits.
_FIELDS: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "auto_mapping": (_is_object, "an object"),
    "base_model_name_or_path": (_is_text, "a name"),
    "bias": (_is_text, "a text"),
    "ensure_weight_tying": (_is_bool, "true or false"),
    "eva_config": (_is_object, "an object"),
    "exclude_modules": (_is_names, "a text or a list of texts"),
    "fan_in_fan_out": (_is_bool, "true or false"),
    "inference_mode": (_is_bool, "true or false"),
    "init_lora_weights": (_is_init, "true, false or a text"),
    "layers_pattern": (_is_names, "a text or a list of texts"),
    "layers_to_transform": (_is_layers, "a layer's number or a list of them"),
    "lora_alpha": (_is_anything, "a finite number"),
    "lora_bias": (_is_bool, "true or false"),
    "lora_dropout": (_is_fraction, "a number from 0 to 1"),
    "megatron_core": (_is_text, "a text"),
    "modules_to_save": (_is_list_of_names, "a list of names"),
    "peft_type": (_is_text, "a text"),
    "peft_version": (_is_text, "a text"),
    "qalora_group_size": (_is_count, "a whole number"),
    "r": (_is_anything, "a whole number of 1 or more"),
    "alpha_pattern": (_is_object, "an object"),
    "rank_pattern": (_is_object, "an object"),
    "revision": (_is_text, "a text"),
    "runtime_config": (_is_object, "an object"),
    "target_modules": (_is_names, "a text or a list of texts"),
    "task_type": (_is_text, "a text"),
    "use_dora": (_is_bool, "true or false"),
    "use_rslora": (_is_bool, "true or false"),
}


# -- the configuration ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selection:
    """Which modules the configuration gives factors to, as far as it says so in plain names.

    ``targets`` is None where it is null or one text: PEFT then asks its own tables or a regular expression, and only
    the tensors tell. Names stand for a module path or the end of one. ``layers`` is None for all.
    """

    targets: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()
    layers: frozenset[int] | None = None
    layers_patterns: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        """Whether PEFT would keep the factors of this module when it loads them. It drops others without a word."""
        ends = _ends(module)
        if not self.excluded.isdisjoint(ends):
            return False
        if self.targets is None or module in self.targets:
            return True
        if self.targets.isdisjoint(ends):
            return False
        return self.layers is None or self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        """The first number in the path, or the first behind one of the patterns, that still has a part behind it."""
        parts = module.split(".")
        for pattern in self.layers_patterns:
            names = pattern.split(".")
            for place in range(len(names), len(parts) - 1):
                if parts[place].isdecimal() and parts[place - len(names) : place] == names:
                    return int(parts[place])
        if self.layers_patterns:
            return None
        return next((int(part) for part in parts[2:-1] if part.isdecimal()), None)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of the configuration that decides the numbers.

    ``base_model`` is the name as it stands in the file, "" where there is none. Patterns map a module path, or the
    end of one, to its own rank or alpha; the first that matches wins, as in PEFT. ``bias`` tells which of the base's
    biases were trained, ``modules_to_save`` which modules as a whole; ``tying`` that an embedding and a head of one
    weight were to have one change.
    """

    base_model: str
    r: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    selection: Selection = Selection()
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init: Init = "plain"
    modules_to_save: tuple[str, ...] = ()
    tying: bool = False

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names this module or one that it is a part of, by the end of its path, as in PEFT."""
        parts = module.split(".") if self.modules_to_save else []
        return any(".".join(parts[:end]).endswith(self.modules_to_save) for end in range(1, len(parts) + 1))

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
    try:
        if not path.is_file():
            raise MissingConfigError(source, f"there is no {CONFIG_FILE}; is it a PEFT adapter?")
        content = read_regular(path, _MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InvalidConfigError(source, f"{CONFIG_FILE} cannot be read: {error.strerror or error}") from error
    if len(content) > _MAX_CONFIG_BYTES:
        raise InvalidConfigError(source, f"{CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES} bytes")
    return content


def adapter_config_from_bytes(content: bytes, source: str) -> AdapterConfig:
    """As ``read_adapter_config``, from the file's content."""
    return parse_adapter_config(config_object(content, source), source)


def parse_adapter_config(raw: Mapping[str, Any], source: str) -> AdapterConfig:
    """As ``read_adapter_config``, from the parsed JSON."""
    config = config_values(raw, source)
    refuse_features(raw, source)
    return config


def config_object(content: bytes, source: str) -> Mapping[str, Any]:
    """The JSON object that the file holds.

    Raises:
        InvalidConfigError: it holds none, or one that readers could take for different things.
    """
    try:
        raw = strict_json(content)
    except ValueError as error:
        raise InvalidConfigError(source, f"{CONFIG_FILE} is no plain JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidConfigError(source, f"{CONFIG_FILE} holds a {type(raw).__name__}, expected an object")
    return raw


def config_values(raw: Mapping[str, Any], source: str) -> AdapterConfig:
    """The numbers and names of a LoRA's configuration, whatever else it switches on.

    Raises:
        InvalidConfigError: a value of a wrong type or that makes no sense.
        UnsupportedFeatureError: it is no LoRA, or a pattern is more than a name.
    """
    # Before all else: the fields of another method have other meanings.
    if raw.get("peft_type") != "LORA":
        raise unsupported(source, "peft_type", raw.get("peft_type"))
    for name, (fits, expected) in _FIELDS.items():
        if raw.get(name) is not None and not fits(raw[name]):
            raise InvalidConfigError(source, f"{name} is {shown(raw[name])}, expected {expected}")
    return AdapterConfig(
        base_model=_base_model(raw.get("base_model_name_or_path") or "", source),
        r=_rank(raw.get("r"), "r", source),
        alpha=_alpha(raw.get("lora_alpha"), "lora_alpha", source),
        use_rslora=raw.get("use_rslora") is True,
        rank_pattern=_patterns(raw, "rank_pattern", _rank, source),
        alpha_pattern=_patterns(raw, "alpha_pattern", _alpha, source),
        selection=_selection(raw, source),
        use_dora=raw.get("use_dora") is True,
        lora_bias=raw.get("lora_bias") is True,
        bias=raw["bias"] if raw.get("bias") in ("all", "lora_only") else "none",
        init=_INITS.get(raw.get("init_lora_weights"), "plain"),
        modules_to_save=tuple(raw.get("modules_to_save") or ()),
        tying=raw.get("ensure_weight_tying") is True,
    )


def refuse_features(raw: Mapping[str, Any], source: str) -> None:
    """Refuse by name what is switched on and cannot be served exactly.

    Raises:
        UnsupportedFeatureError: the first such field.
    """
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise unsupported(source, "task_type", raw.get("task_type"))
    if raw.get("bias") not in _BIASES:
        raise unsupported(source, "bias", raw["bias"])
    if raw.get("init_lora_weights") not in _INITS:
        raise unsupported(source, "init_lora_weights", raw["init_lora_weights"])
    if raw.get("lora_bias") and raw.get("use_dora"):
        raise unsupported(source, "lora_bias with use_dora", True)
    if raw.get("lora_bias") and isinstance(raw.get("init_lora_weights"), str):
        raise unsupported(source, "lora_bias with init_lora_weights", raw["init_lora_weights"])
    for name in sorted(raw.keys() - _FIELDS.keys()):
        if raw[name] not in _OFF:
            raise unsupported(source, name, raw[name])


def _base_model(name: str, source: str) -> str:
    problem = ""
    if len(name) > _MAX_BASE:
        problem = f"longer than {_MAX_BASE} characters"
    elif name != name.strip():
        problem = "framed by blanks"
    elif not name.isprintable():
        problem = "not printable"
    elif not name.isascii() and not _PATH.match(name):
        # The Hub has ASCII names only; a letter of another alphabet would pass for the one it looks like.
        problem = "neither a path nor an ASCII name"
    if problem:
        raise InvalidConfigError(source, f"base_model_name_or_path is {problem}: {shown(name)}; correct {CONFIG_FILE}")
    return name


def _rank(value: object, name: str, source: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidConfigError(source, f"{name} is {shown(value)}, expected a whole number of 1 or more")
    return value


def _alpha(value: object, name: str, source: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Python has whole numbers that no float can hold.
    if not (number and abs(value) <= sys.float_info.max):  # type: ignore[arg-type]
        raise InvalidConfigError(source, f"{name} is {shown(value)}, expected a finite number")
    return float(value)  # type: ignore[arg-type]


def _patterns(
    raw: Mapping[str, Any], name: str, read: Callable[[object, str, str], _Number], source: str
) -> dict[str, _Number]:
    found: dict[str, _Number] = {}
    for key, value in (raw.get(name) or {}).items():
        # Two spellings of one name: the first wins.
        found.setdefault(_pattern(key, name, source), read(value, f"{name}[{shown(key)}]", source))
    return found


def _pattern(key: str, name: str, source: str) -> str:
    """A pattern key without its escapes. PEFT reads keys as regular expressions; a stranger's never run here."""
    literal = key.replace(r"\.", ".").removesuffix("$")
    if not re.fullmatch(r"\^?[\w.\-]+", literal):
        raise unsupported(source, f"{name} with a regular expression", key)
    return literal


def _selection(raw: Mapping[str, Any], source: str) -> Selection:
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern")
    if isinstance(targets, str) and not (layers is None and patterns is None):
        raise InvalidConfigError(source, "layers_to_transform and layers_pattern need target_modules to be a list")
    if patterns and layers is None:
        raise InvalidConfigError(source, "layers_pattern needs layers_to_transform")
    names = [patterns] if isinstance(patterns, str) and patterns else list(patterns or ())
    for pattern in names:
        if not re.fullmatch(r"[\w.\-]+", pattern):
            raise unsupported(source, "layers_pattern with a regular expression", pattern)
    numbers = [layers] if isinstance(layers, int) else layers or ()
    return Selection(
        targets=frozenset(targets) if isinstance(targets, list) else None,
        excluded=frozenset(excluded) if isinstance(excluded, list) else frozenset(),
        layers=frozenset(numbers) or None,
        layers_patterns=tuple(names),
    )


def _ends(module: str) -> tuple[str, ...]:
    """The path itself and whatever stands behind one of its dots."""
    ends, dot = [module], module.find(".")
    while dot >= 0:
        ends.append(module[dot + 1 :])
        dot = module.find(".", dot + 1)
    return tuple(ends)


def _first_match(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    hits = {f"^{module}", *_ends(module)} & patterns.keys() if patterns else ()
    return patterns[next(key for key in patterns if key in hits)] if hits else default
