"""Damaged and hostile adapters: each case takes a good adapter's folder and spoils it in one way. No torch."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lora_hub_sdk.errors import (
    AdmissionError,
    DamagedWeightsError,
    InvalidConfigError,
    MissingConfigError,
    MissingWeightsError,
    NoEffectError,
    NonFiniteWeightsError,
    OutOfBoundsError,
    ShapeMismatchError,
    UnmatchedTensorsError,
    UnsafeWeightsError,
    UnsupportedFeatureError,
)
from lora_hub_sdk.registry.layout import BaseLayout

RANK: Final = 4
SHAPES: Final = {
    f"model.layers.{layer}.self_attn.{name}": (rows, 32)
    for layer in range(2)
    for name, rows in {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}.items()
}
_ENDS: Final = {"model.embed_tokens": {"weight": (64, 32)}, "lm_head": {"weight": (64, 32)}}
LAYOUT: Final = BaseLayout(
    linears={**SHAPES, "lm_head": (64, 32)},
    embedding=("model.embed_tokens", (64, 32)),
    parameters={**{path: {"weight": shape} for path, shape in SHAPES.items()}, **_ENDS, "norm": {"weight": (32,)}},
    head="lm_head",
    others=frozenset({"model.embed_positions"}),
)
CONFIG: Final[dict[str, Any]] = {
    "base_model_name_or_path": "somebody/tiny",
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
}
#: What a planted pickle makes when somebody loads it, in the adapter's folder.
MARKER: Final = "executed"
_Q: Final = "base_model.model.model.layers.0.self_attn.q_proj"
_A: Final = f"{_Q}.lora_A.weight"
_B: Final = f"{_Q}.lora_B.weight"
_WIDTH: Final = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}

#: A tensor of a safetensors file: dtype, shape, bytes.
Tensor = tuple[str, list[int], bytes]
Spoil = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Damage:
    """One spoiled adapter. ``error`` None: it may also be another good adapter, but then not under the same digest."""

    name: str
    error: type[AdmissionError] | None
    spoil: Spoil


# -- building ---------------------------------------------------------------------------------------------------


def good_tensors() -> dict[str, Tensor]:
    """The tensors of the good adapter, float32."""
    random = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {}
    for module, (rows, columns) in SHAPES.items():
        if module.endswith(("q_proj", "v_proj")):
            for side, shape in (("A", [RANK, columns]), ("B", [rows, RANK])):
                values = random.standard_normal(shape).astype("<f4") / 8
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = ("F32", shape, values.tobytes())
    return tensors


def write_good(folder: Path) -> Path:
    """Write the good adapter; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    _weights(folder).write_bytes(pack(good_tensors()))
    return folder


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    return framed(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def framed(header: bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A file of any header and any data; ``length`` is what it claims for the header."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def bomb(folder: Path) -> bytes:
    """A pickle that makes ``MARKER`` in the folder when it is loaded."""
    return pickle.dumps(_Bomb(str(folder / MARKER)))


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def _config(folder: Path) -> Path:
    return folder / "adapter_config.json"


# -- ways to spoil ----------------------------------------------------------------------------------------------


def _set(**changes: Any) -> Spoil:
    return lambda folder: _config(folder).write_text(json.dumps({**CONFIG, **changes}))


def _without(name: str) -> Spoil:
    left = {key: value for key, value in CONFIG.items() if key != name}
    return lambda folder: _config(folder).write_text(json.dumps(left))


def _raw_field(name: str, text: str) -> Spoil:
    """A field of JSON text that no writer would produce."""
    whole = json.dumps({key: value for key, value in CONFIG.items() if key != name})
    return lambda folder: _config(folder).write_text(f'{whole[:-1]}, "{name}": {text}}}')


def _config_bytes(content: bytes) -> Spoil:
    return lambda folder: _config(folder).write_bytes(content)


def _weight_bytes(content: bytes) -> Spoil:
    return lambda folder: _weights(folder).write_bytes(content)


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = good_tensors()
        change(tensors)
        _weights(folder).write_bytes(pack(tensors))

    return spoil


def _put(name: str, tensor: Tensor) -> Spoil:
    return _tensors(lambda tensors: tensors.update({name: tensor}))


def _renamed(old: str, new: str) -> Spoil:
    return _tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


def _header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """The good file under another header."""

    def spoil(folder: Path) -> None:
        header, data = _split(pack(good_tensors()))
        parsed = json.loads(header)
        change(parsed)
        _weights(folder).write_bytes(framed(json.dumps(parsed).encode(), data))

    return spoil


def _header_text(change: Callable[[str], str]) -> Spoil:
    def spoil(folder: Path) -> None:
        header, data = _split(pack(good_tensors()))
        _weights(folder).write_bytes(framed(change(header.decode()).encode(), data))

    return spoil


def _split(whole: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(whole[:8], "little")
    return whole[8:end], whole[end:]


def _flip(path: Callable[[Path], Path], place: int, bit: int) -> Spoil:
    def spoil(folder: Path) -> None:
        content = bytearray(path(folder).read_bytes())
        content[place] ^= 1 << bit
        path(folder).write_bytes(content)

    return spoil


def _instead(path: Callable[[Path], Path], make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        path(folder).unlink()
        make(path(folder))

    return spoil


def _sparse(path: Callable[[Path], Path], size: int) -> Spoil:
    return lambda folder: os.truncate(path(folder), size)


def _spread(size: int, count: int) -> list[int]:
    return sorted({round(place * (size - 1) / (count - 1)) for place in range(count)})


def _filled(dtype: str, shape: list[int], value: float) -> Tensor:
    """A tensor that holds one value, and beside it something ordinary."""
    values = np.full(shape, 0.01, dtype="<f8")
    values[-1, -1] = value
    if dtype == "BF16":
        return dtype, shape, (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return dtype, shape, values.astype(f"<f{_WIDTH[dtype]}").tobytes()


def _of_dtype(dtype: str) -> Tensor:
    return dtype, [RANK, 32], bytes(RANK * 32 * _WIDTH.get(dtype, 1))


# -- the cases --------------------------------------------------------------------------------------------------


def damages() -> list[Damage]:
    """All cases, in a fixed order, names unique."""
    return [
        *_broken_off(),
        *_flipped(),
        *_no_plain_files(),
        *_pickles(),
        *_bad_json(),
        *_bad_values(),
        *_bad_names(),
        *_features(),
        *_bad_headers(),
        *_bad_tensors(),
        *_bad_numbers(),
    ]


def _broken_off() -> Iterator[Damage]:
    weights, config = pack(good_tensors()), json.dumps(CONFIG).encode()
    for size in _spread(len(weights), 50):
        yield Damage(f"weights cut to {size} bytes", DamagedWeightsError, _weight_bytes(weights[:size]))
    for size in _spread(len(config), 30):
        yield Damage(f"configuration cut to {size} bytes", InvalidConfigError, _config_bytes(config[:size]))
    for more in (1, 8, 4096):
        yield Damage(f"weights with {more} more bytes", DamagedWeightsError, _weight_bytes(weights + bytes(more)))
    yield Damage("weights twice", DamagedWeightsError, _weight_bytes(weights * 2))
    yield Damage("configuration twice", InvalidConfigError, _config_bytes(config * 2))
    yield Damage("weights of zeros", DamagedWeightsError, _weight_bytes(bytes(len(weights))))
    yield Damage("configuration of zeros", InvalidConfigError, _config_bytes(bytes(len(config))))
    yield Damage("files changed places", InvalidConfigError, _exchange)


def _exchange(folder: Path) -> None:
    weights, config = _weights(folder).read_bytes(), _config(folder).read_bytes()
    _weights(folder).write_bytes(config)
    _config(folder).write_bytes(weights)


def _flipped() -> Iterator[Damage]:
    header, data = _split(pack(good_tensors()))
    for count, place in enumerate(_spread(8 + len(header), 60)):
        yield Damage(f"header flipped at {place}", None, _flip(_weights, place, count % 8))
    for count, place in enumerate(_spread(len(data), 40)):
        yield Damage(f"data flipped at {place}", None, _flip(_weights, 8 + len(header) + place, (5 * count) % 8))
    for count, place in enumerate(_spread(len(json.dumps(CONFIG)), 40)):
        yield Damage(f"configuration flipped at {place}", None, _flip(_config, place, (3 * count) % 7))


def _no_plain_files() -> Iterator[Damage]:
    for what, path, error in (
        ("configuration", _config, MissingConfigError),
        ("weights", _weights, MissingWeightsError),
    ):
        kinds: dict[str, Callable[[Path], object]] = {
            "missing": lambda file: None,
            "a folder": lambda file: file.mkdir(),
            "a link to itself": lambda file: file.symlink_to(file.name),
            "a link to nothing": lambda file: file.symlink_to("nowhere"),
            "a link to a folder": lambda file: file.symlink_to(".."),
            "a link to a device": lambda file: file.symlink_to("/dev/zero"),
            "a pipe": lambda file: os.mkfifo(file),
            "a link to a pipe": _link_to_pipe,
        }
        for kind, make in kinds.items():
            yield Damage(f"{what}: {kind}", error, _instead(path, make))
    yield Damage("configuration: empty", InvalidConfigError, _config_bytes(b""))
    yield Damage("weights: empty", DamagedWeightsError, _weight_bytes(b""))
    yield Damage("configuration: a link to a secret", InvalidConfigError, _instead(_config, _link_to_secret))
    yield Damage("weights: a link to a secret", DamagedWeightsError, _instead(_weights, _link_to_secret))
    yield Damage("configuration: 10 GiB of nothing", InvalidConfigError, _sparse(_config, 10 << 30))
    yield Damage("weights: 10 GiB of nothing", OutOfBoundsError, _sparse(_weights, 10 << 30))
    yield Damage("weights: 3 GiB of nothing", OutOfBoundsError, _sparse(_weights, 3 << 30))
    yield Damage("weights: 9 MiB, too much for this base", OutOfBoundsError, _sparse(_weights, 9 << 20))
    yield Damage("folder: empty", MissingConfigError, _empty)


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _link_to_pipe(file: Path) -> None:
    os.mkfifo(file.with_name("pipe"))
    file.symlink_to("pipe")


#: Stands in a file outside of the adapter, and must stand in no message.
SECRET: Final = "correct horse battery staple"


def _link_to_secret(file: Path) -> None:
    outside = file.parent.with_name(f"{file.parent.name}-outside")
    outside.write_text(SECRET)
    file.symlink_to(outside)


def _pickles() -> Iterator[Damage]:
    def zipped(folder: Path) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("archive/data.pkl", bomb(folder))
        return content.getvalue()

    def only(name: str) -> Spoil:
        def spoil(folder: Path) -> None:
            _weights(folder).unlink()
            (folder / name).write_bytes(bomb(folder))

        return spoil

    def in_header(folder: Path) -> None:
        _weights(folder).write_bytes(framed(bomb(folder), b""))

    yield Damage("pickle as safetensors", DamagedWeightsError, lambda f: _weights(f).write_bytes(bomb(f)))
    yield Damage("zipped pickle as safetensors", DamagedWeightsError, lambda f: _weights(f).write_bytes(zipped(f)))
    yield Damage("pickle as configuration", InvalidConfigError, lambda f: _config(f).write_bytes(bomb(f)))
    yield Damage("pickle as header", DamagedWeightsError, in_header)
    yield Damage(
        "pickle behind the data", DamagedWeightsError, lambda f: _weights(f).write_bytes(pack(good_tensors()) + bomb(f))
    )
    yield Damage("pickle alone", UnsafeWeightsError, only("adapter_model.bin"))
    yield Damage("pickle in parts", UnsafeWeightsError, only("adapter_model-00001-of-00002.bin"))
    yield Damage("pickle of another name", MissingWeightsError, only("weights.pt"))


def _bad_json() -> Iterator[Damage]:
    whole = json.dumps(CONFIG)
    contents = {
        "a list": b"[]",
        "a text": b'"LORA"',
        "a number": b"7",
        "null": b"null",
        "JSON5": b"{peft_type: 'LORA'}",
        "a comment": whole.replace("{", "{ // mine\n", 1).encode(),
        "a trailing comma": whole.replace("}", ",}").encode(),
        "a byte order mark": b"\xef\xbb\xbf" + whole.encode(),
        "UTF-16": whole.encode("utf-16"),
        "UTF-32": whole.encode("utf-32"),
        "broken UTF-8": whole.replace("somebody", "some\udcffbody").encode("utf-8", "surrogateescape"),
        "overlong UTF-8": whole.encode().replace(b"somebody", b"\xc0\xafbody"),
        "NUL at the end": whole.encode() + b"\0",
        "NUL in a text": whole.encode().replace(b"somebody", b"some\0body"),
        "a field twice": whole.replace('"r": 4', '"r": 4, "r": 8').encode(),
        "a field twice, the same": whole.replace('"r": 4', '"r": 4, "r": 4').encode(),
        "a field twice, once escaped": whole.replace('"r": 4', '"r": 4, "\\u0072": 8').encode(),
        "a field twice, inside": whole.replace('"rank_pattern": {}', '"rank_pattern": {"q": 4, "q": 8}').encode(),
        "100000 lists": b"[" * 100_000,
        "100000 objects": b'{"a":' * 100_000,
        "100000 lists, closed": b"[" * 100_000 + b"]" * 100_000,
        "2 MB of blanks": whole.encode() + b" " * 2_000_000,
        "10 MB of text": whole.replace("somebody", "a" * 10_000_000).encode(),
    }
    for name, content in contents.items():
        yield Damage(f"configuration: {name}", InvalidConfigError, _config_bytes(content))
    for depth in (20, 500):
        nested = '{"a": ' + "[" * depth + "]" * depth + "}"
        yield Damage(f"configuration: {depth} lists", InvalidConfigError, _raw_field("auto_mapping", nested))
    for literal in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 30, "9" * 5_000, "0." + "1" * 500_000):
        name = literal if len(literal) < 12 else f"{len(literal)} digits"
        for field in ("lora_alpha", "lora_dropout", "a_new_field"):
            yield Damage(f"{field}: {name}", InvalidConfigError, _raw_field(field, literal))


def _bad_values() -> Iterator[Damage]:
    wrong: dict[str, tuple[Any, ...]] = {
        "r": (None, 0, -1, 4.0, "4", True, [4], {}),
        "lora_alpha": (None, "8", True, [8], {}),
        "lora_dropout": ("0", -1, 2, [0.1]),
        "use_rslora": ("true", 1, []),
        "target_modules": (
            7,
            {"q_proj": 1},
            [["q_proj"]],
            [None],
            ["q_proj", 7],
            "a" * 20_000,
            ["a" * 20_000],
            ["q"] * 30_000,
        ),
        "exclude_modules": (7, [7], {"q_proj": 1}),
        "layers_to_transform": ("0", [0, "1"], [0.0], [True], [-1], {"0": 1}, [1 << 40]),
        "layers_pattern": (7, [7], {"layers": 1}),
        "rank_pattern": (
            [],
            ["q_proj"],
            "q_proj",
            7,
            {"q_proj": 0},
            {"q_proj": "4"},
            {"q_proj": None},
            {"q_proj": [4]},
        ),
        "alpha_pattern": ([8], "q_proj", {"q_proj": "8"}, {"q_proj": None}, {"q_proj": True}),
        "fan_in_fan_out": ("false", 0),
        "inference_mode": ("true", {}),
        "init_lora_weights": (1, ["pissa"], {}),
        "auto_mapping": ("x", [1]),
        "eva_config": ("x", [1]),
        "runtime_config": ("x", [1]),
        "megatron_core": (7, ["os"]),
        "peft_version": (7, ["0"]),
        "revision": (7, "a" * 20_000),
        "qalora_group_size": ("16", -1, 1.5),
        "task_type": (7, ["CAUSAL_LM"]),
        "bias": (7, ["none"], True),
    }
    for field, values in wrong.items():
        for value in values:
            if (field, value) == ("rank_pattern", []):
                continue
            name = repr(value) if len(repr(value)) < 30 else f"{repr(value)[:12]}... of {len(value)}"
            yield Damage(f"{field}: {name}", InvalidConfigError, _set(**{field: value}))
    many = {f"m{number}": 4 for number in range(25_000)}
    yield Damage("rank_pattern: 25000 names", InvalidConfigError, _set(rank_pattern=many))
    for field in ("r", "lora_alpha"):
        yield Damage(f"{field}: absent", InvalidConfigError, _without(field))
    yield Damage(
        "layers_to_transform: for one text", InvalidConfigError, _set(target_modules="q_proj", layers_to_transform=[0])
    )
    yield Damage("layers_pattern: for one text", InvalidConfigError, _set(target_modules="q_proj", layers_pattern="h"))
    yield Damage("layers_pattern: without layers", InvalidConfigError, _set(layers_pattern=["layers"]))


def _bad_names() -> Iterator[Damage]:
    names = {
        "a number": 7,
        "a list": ["somebody/tiny"],
        "an object": {"name": "somebody/tiny"},
        "true": True,
        "blank behind": "somebody/tiny ",
        "blank before": " somebody/tiny",
        "newline behind": "somebody/tiny\n",
        "newline inside": "somebody/\ntiny",
        "tab": "some\tbody/tiny",
        "NUL": "somebody/tiny\0",
        "escape": "somebody/\x1b[31mtiny",
        "Cyrillic": "sоmebody/tiny",  # noqa: RUF001
        "Greek": "somebody/τiny",
        "full width": "somebody/ｔiny",  # noqa: RUF001
        "no-break blank": "somebody/tiny\xa0",
        "zero width": "some\u200bbody/tiny",
        "right to left": "some\u202ebody/tiny",
        "combining mark": "somebo\u0301dy/tiny",
        "division slash": "somebody\u2215tiny",
        "lone surrogate": "somebody/\ud800",
        "path with a control character": "/models/\x07tiny",
        "2000 letters": "a" * 2_000,
    }
    for name, value in names.items():
        yield Damage(f"base model: {name}", InvalidConfigError, _set(base_model_name_or_path=value))


def _features() -> Iterator[Damage]:
    kinds = ("lora", "LORA ", " LORA", "Lora", "ＬＯＲＡ", "LОRA", "LORA\0", "", None, 7, True, ["LORA"], {"LORA": 1})  # noqa: RUF001
    for kind in (*kinds, "IA3", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "PROMPT_TUNING", "PREFIX_TUNING"):
        yield Damage(f"peft_type: {kind!r}", UnsupportedFeatureError, _set(peft_type=kind))
    yield Damage("peft_type: absent", UnsupportedFeatureError, _without("peft_type"))
    switched_on: dict[str, tuple[Any, ...]] = {
        "task_type": ("SEQ_CLS", "causal_lm", "a" * 5_000),
        "bias": ("None",),
        "use_dora": (True,),
        "lora_bias": (True,),
        "modules_to_save": (["model.embed_positions"],),
        "init_lora_weights": ("PiSSA", "pissa_niter_16", "corda", "loftq", "lora_ga", "GAUSSIAN", "../x"),
        "trainable_token_indices": ([1], {"embed_tokens": [1]}),
        "layer_replication": ([[0, 1]],),
        "target_parameters": (["mlp.experts"],),
        "a_new_field": (True, 1e-9, "on", [0], {"a": None}, "x" * 500_000, [[[[[[]]]]]]),
        "a\nnew\x1b[31m field": (1,),
        "__class__": ("os.system",),
        "auto_map": ({"AutoModel": "evil.py"},),
        "f" * 100_000: (1,),
        "фield": (1,),
    }
    for field, values in switched_on.items():
        for value in values:
            name = f"{ascii(field)[:30]}: {ascii(value)[:30]}"
            yield Damage(name, UnsupportedFeatureError, _set(**{field: value}))
    yield Damage("modules_to_save of nothing stored", UnmatchedTensorsError, _set(modules_to_save=["lm_head"]))
    yield Damage("modules_to_save and adapted", UnsupportedFeatureError, _set(modules_to_save=["q_proj"]))
    for init in ("pissa", "olora"):
        yield Damage(f"another adapter: {init}", None, _set(init_lora_weights=init))
    for field in ("rank_pattern", "alpha_pattern"):
        for key in (
            "(a+)+$",
            "(q|k)_proj",
            ".*",
            "[a-z",
            "",
            "a{1,99999}",
            "q_proj\\",
            "q_proj ",
            "\n",
            "(?e)",
            "x(" * 4_000,
        ):
            yield Damage(f"{field}: {key[:20]!r}", UnsupportedFeatureError, _set(**{field: {key: 4}}))
    bombs = _set(layers_to_transform=[0], layers_pattern=["(a+)+$"])
    yield Damage("layers_pattern: (a+)+$", UnsupportedFeatureError, bombs)


def _bad_headers() -> Iterator[Damage]:
    one = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    files = {
        "length 0": framed(b"", b""),
        "length 2 ** 63": framed(b"{}", b"", length=1 << 63),
        "length 2 ** 64 - 1": framed(b"{}", b"", length=(1 << 64) - 1),
        "length 100 MB": framed(b"{}", b"", length=100_000_000),
        "length one too long": framed(b"{}", b"", length=3),
        "a list": framed(b"[]", b""),
        "null": framed(b"null", b""),
        "100000 lists": framed(b"[" * 100_000, b""),
        "100000 objects": framed(b'{"a":' * 100_000, b""),
        "deep metadata": framed(b'{"__metadata__": {"a": ' + b"[" * 300 + b"]" * 300 + b"}}", b""),
        "metadata of numbers": framed(b'{"__metadata__": {"a": 1}}', b""),
        "metadata twice": framed(b'{"__metadata__": {"a": "1"}, "__metadata__": {"a": "2"}}', b""),
        "metadata's name twice": framed(b'{"__metadata__": {"a": "1", "a": "2"}}', b""),
        "a name twice": framed(f"{{{one}, {one}}}".encode(), bytes(4)),
        "a byte order mark": framed(b"\xef\xbb\xbf{}", b""),
        "broken UTF-8": framed(b'{"\xff": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
        "NaN": framed(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4)),
        "8 MiB": framed(b'{"a": "' + b"a" * (8 << 20) + b'"}', b""),
    }
    for name, content in files.items():
        yield Damage(f"header: {name}", DamagedWeightsError, _weight_bytes(content))

    def entry(**changes: Any) -> Spoil:
        return _header(lambda header: header[_A].update(changes))

    entries: dict[str, Spoil] = {
        "no dtype": _header(lambda header: header[_A].pop("dtype")),
        "no shape": _header(lambda header: header[_A].pop("shape")),
        "no place": _header(lambda header: header[_A].pop("data_offsets")),
        "entry is a list": _header(lambda header: header.update({_A: []})),
        "entry is null": _header(lambda header: header.update({_A: None})),
        "unknown dtype": entry(dtype="F33"),
        "dtype in lower case": entry(dtype="f32"),
        "dtype is a number": entry(dtype=32),
        "dtype of 100 kB": entry(dtype="F" * 100_000),
        "dtype of another width": entry(dtype="F64"),
        "shape is a number": entry(shape=128),
        "shape is negative": entry(shape=[-4, -32]),
        "shape is a fraction": entry(shape=[4.0, 32]),
        "shape is huge": entry(shape=[1 << 40, 1 << 40]),
        "shape overflows": entry(shape=[1 << 63, 2]),
        "shape overflows to right": entry(shape=[(1 << 62) + 1, 128, 4]),
        "shape is too large": entry(shape=[4, 33]),
        "shape is too small": entry(shape=[4, 31]),
        "shape has no size": entry(shape=[0, 32]),
        "place is before the data": entry(data_offsets=[-512, 0]),
        "place is behind the data": entry(data_offsets=[1 << 20, (1 << 20) + 512]),
        "place is backwards": entry(data_offsets=[512, 0]),
        "place is huge": entry(data_offsets=[0, 1 << 60]),
        "place overflows": entry(data_offsets=[(1 << 64) - 512, 1 << 64]),
        "place overlaps": entry(data_offsets=[4, 516]),
        "place of another tensor": _header(lambda header: header.update({_B: {**header[_A], "shape": [32, 4]}})),
        "place has three ends": entry(data_offsets=[0, 512, 1024]),
        "place is empty": entry(data_offsets=[0, 0]),
        "more tensors than data": _header(lambda header: header.update({"x": {**header[_A]}})),
        "fewer tensors than data": _header(lambda header: header.pop(_A)),
        "dtype twice": _header_text(lambda text: text.replace('{"dtype": "F32"', '{"dtype": "F32", "dtype": "F32"', 1)),
        "tensor twice, other shape": _header_text(_twice),
        "wrong type of quotes": _header_text(lambda text: text.replace('"', "'")),
    }
    for name, spoil in entries.items():
        yield Damage(f"header: {name}", DamagedWeightsError, spoil)


def _twice(header: str) -> str:
    """The first tensor a second time, transposed: the last counts for some readers, the first for others."""
    entry = {**json.loads(header)[_A], "shape": [32, RANK]}
    return f"{{{json.dumps(_A)}: {json.dumps(entry)}, {header[1:]}"


def _bad_tensors() -> Iterator[Damage]:
    for dtype in ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I16", "U16", "I32", "U32", "I64", "U64", "C64"):
        yield Damage(f"dtype {dtype}", UnsupportedFeatureError, _put(_A, _of_dtype(dtype)))
    small: Tensor = ("F32", [4, 32], bytes(512))
    tail = ".lora_A.weight"
    strangers = (
        "x",
        "",
        "../../../../etc/passwd",
        f"base_model.model.../../etc/passwd{tail}",
        f"base_model.model./etc/passwd{tail}",
        f"base_model.model.__class__.__init__.__globals__{tail}",
        f"base_model.model.model.layers.__class__{tail}",
        f"base_model.model.model.layers.-1.self_attn.q_proj{tail}",
        f"base_model.model.model.layers.00.self_attn.q_proj{tail}",
        f"base_model.model.model.layers.99999999999999999999.self_attn.q_proj{tail}",
        f"base_model.model.MODEL.layers.0.self_attn.q_proj{tail}",
        f"base_model.model.model.layers.0.self_attn.q_proj {tail}",
        f"base_model.model.model.layers.0.self_attn.q_proj\0{tail}",
        f"base_model.model.model.layers.0.self_attn.q_proj\n{tail}",
        f"base_model.model.model.layers.0.self_attn.q_рroj{tail}",  # noqa: RUF001
        f"base_model.model.model.layers.0.self_attn.{'q' * 100_000}{tail}",
        f"base_model.model.{'a.' * 50_000}{tail}",
        f"base_model.model.{'.lora_A' * 20_000}{tail}",
        f"base_model.model.{tail}",
        f"{_Q}.lora_C.weight",
        f"{_Q}.lora_a.weight",
        f"{_Q}.lora_A.WEIGHT",
        f"{_Q}.lora_A.weight.weight",
        f"{_Q}.lora_A.default.weight",
        f"{_Q}.lora_A.bias",
        f"{_Q}.lora_A",
        f"{_Q}.lora_A.weight\n",
        f" {_Q}.lora_A.weight",
        f"{_Q}.weight",
        f"{_Q}.base_layer.weight",
        f"{_Q}.lora_magnitude_vector.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.model.embed_tokens.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.norm.weight",
        "base_model.model.norm.lora_A.weight",
        "base_model.model.lm_head.bias",
        "\x1b[31mred",
        "\u202ereversed",
    )
    for name in strangers:
        yield Damage(f"more: {ascii(name)[:70]} of {len(name)}", UnmatchedTensorsError, _put(name, small))
    methods = {
        "IA3": "ia3_l", "AdaLoRA": "lora_E", "AdaLoRA's own A": "lora_A", "LoHa": "hada_w1_a", "LoKr": "lokr_w1",
        "OFT": "oft_R.weight", "VeRA": "vera_lambda_b", "FourierFT": "fourierft_spectrum", "BOFT": "boft_R",
    }  # fmt: skip
    for method, suffix in methods.items():
        yield Damage(f"keys of {method}", UnmatchedTensorsError, _put(f"{_Q}.{suffix}", small))
        alone = _tensors(lambda tensors, key=f"{_Q}.{suffix}": (tensors.clear(), tensors.update({key: small})))  # type: ignore[misc]
        yield Damage(f"nothing but keys of {method}", UnmatchedTensorsError, alone)
    yield Damage("keys of prompt tuning", UnmatchedTensorsError, _put("prompt_embeddings", small))
    for name in (
        f"{_Q}.lora_magnitude_vector",
        f"{_Q}.lora_B.bias",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.model.embed_positions.lora_embedding_A",
        "base_model.model.lm_head.weight",
    ):
        yield Damage(f"feature: {name[-40:]}", UnsupportedFeatureError, _put(name, small))
    for key in good_tensors():
        yield Damage(f"without {key[30:]}", UnmatchedTensorsError, _tensors(lambda tensors, key=key: tensors.pop(key)))  # type: ignore[misc]
    yield Damage("no tensors", UnmatchedTensorsError, _tensors(lambda tensors: tensors.clear()))
    yield Damage("A renamed to another module", UnmatchedTensorsError, _renamed(_A, _A.replace("q_proj", "o_proj")))
    yield Damage("A renamed to another layer", UnmatchedTensorsError, _renamed(_A, _A.replace("s.0.", "s.7.")))
    yield Damage("A and B exchanged", ShapeMismatchError, _tensors(_exchange_sides))
    shapes = ([32, 4], [4, 16, 2], [128], [4, 32, 1], [1, 4, 32], [2, 64], [8, 16], [1, 128])
    for shape in shapes:
        yield Damage(f"A of shape {shape}", ShapeMismatchError, _put(_A, ("F32", shape, bytes(512))))
    for shape in ([0, 32], [4, 0], [0], [0, 0]):
        yield Damage(f"A of shape {shape}, empty", ShapeMismatchError, _put(_A, ("F32", shape, b"")))
    yield Damage("A of no dimension", ShapeMismatchError, _put(_A, ("F32", [], bytes(4))))
    yield Damage("A of 20000 dimensions", ShapeMismatchError, _put(_A, ("F32", [1] * 20_000, bytes(4))))
    yield Damage("A of rank 5", ShapeMismatchError, _put(_A, ("F32", [5, 32], bytes(640))))
    yield Damage("B of another base", ShapeMismatchError, _put(_B, ("F32", [64, 4], bytes(1024))))
    yield Damage("configured rank 8", ShapeMismatchError, _set(r=8))
    yield Damage(
        "configured rank of one module", ShapeMismatchError, _set(rank_pattern={"layers.1.self_attn.q_proj": 2})
    )
    contradictions: dict[str, dict[str, Any]] = {
        "target_modules leaves out v_proj": {"target_modules": ["q_proj"]},
        "target_modules is empty": {"target_modules": []},
        "target_modules of other names": {"target_modules": ["(a+)+$", ".*", "proj"]},
        "exclude_modules names v_proj": {"exclude_modules": ["v_proj"]},
        "layers_to_transform leaves out layer 1": {"layers_to_transform": [0]},
        "layers_to_transform is 1": {"layers_to_transform": 1},
        "layers_pattern of another model": {"layers_to_transform": [0, 1], "layers_pattern": "h"},
    }
    for name, changes in contradictions.items():
        yield Damage(name, UnmatchedTensorsError, _set(**changes))


def _exchange_sides(tensors: dict[str, Tensor]) -> None:
    tensors[_A], tensors[_B] = tensors[_B], tensors[_A]


def _bad_numbers() -> Iterator[Damage]:
    for dtype in ("F16", "BF16", "F32", "F64"):
        for key, shape in ((_A, [4, 32]), (_B, [32, 4])):
            for value in (float("nan"), float("inf"), float("-inf")):
                spoil = _put(key, _filled(dtype, shape, value))
                yield Damage(f"{value} in {dtype} {key[-8]}", NonFiniteWeightsError, spoil)
    for dtype, value in (
        ("BF16", 1e5),
        ("BF16", -3e38),
        ("F32", 65505.0),
        ("F32", -3e38),
        ("F64", 1e300),
        ("F64", -1e308),
    ):
        for key, shape in ((_A, [4, 32]), (_B, [32, 4])):
            yield Damage(f"{value:g} in {dtype} {key[-8]}", OutOfBoundsError, _put(key, _filled(dtype, shape, value)))
    for dtype in ("F16", "BF16", "F32", "F64"):
        spoil = _put(_B, _filled(dtype, [32, 4], 6e4))
        yield Damage(f"a norm beyond all in {dtype}", OutOfBoundsError, spoil)
    for alpha in (1e9, -1e9, 1e308, -1e308, 1e5, 10**17):
        yield Damage(f"lora_alpha {alpha}", OutOfBoundsError, _set(lora_alpha=alpha))
        yield Damage(f"alpha_pattern {alpha}", OutOfBoundsError, _set(alpha_pattern={"v_proj": alpha}))
        yield Damage(f"lora_alpha {alpha}, rsLoRA", OutOfBoundsError, _set(lora_alpha=alpha, use_rslora=True))
    for rank in (513, 1 << 20, 10**17):
        yield Damage(f"r {rank}", OutOfBoundsError, _set(r=rank))
        yield Damage(f"rank_pattern {rank}", OutOfBoundsError, _set(rank_pattern={"q_proj": rank}))
    yield Damage("lora_alpha 4000", OutOfBoundsError, _set(lora_alpha=4000))
    for alpha in (0, 0.0, -0.0, 1e-300):
        yield Damage(f"lora_alpha {alpha}", NoEffectError, _set(lora_alpha=alpha))
    for side in ("A", "B", "AB"):
        yield Damage(f"every {side} zero", NoEffectError, _tensors(lambda tensors, side=side: _clear(tensors, side)))  # type: ignore[misc]


def _clear(tensors: dict[str, Tensor], sides: str) -> None:
    for key, (dtype, shape, data) in tensors.items():
        if key[-8] in sides:
            tensors[key] = (dtype, shape, bytes(len(data)))
