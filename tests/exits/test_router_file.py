"""Router files that are not what was saved: every bit of a file, and files whose digest is right and content is not."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_router import MODEL, made_for

from tide_jax import ExitConfig, Routers, TideError
from tide_jax.config import RiskGuarantee
from tide_jax.exits import router_file
from tide_jax.exits.router import model_identity

EXAMPLES = int(os.environ.get("TIDE_EXAMPLES", "150"))
PROMISE = RiskGuarantee(
    risk=0.02,
    delta=0.05,
    loss="disagreement",
    sequences=300,
    tokens=9000,
    p_value=0.03,
    observed=0.011,
    depth=0.9,
    max_length=256,
    exit_threshold=0.9,
    min_layers=4,
)
SETTINGS = ExitConfig(exit_threshold=0.9, min_layers=4, guarantee=PROMISE).to_dict()


def whole(**changes: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and metadata of a file with everything that a file can hold."""
    tensors, metadata = saved()
    return dict(tensors), metadata | changes


@functools.cache
def saved() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    routers = made_for(MODEL, affine=True, translator_rank=2, exit_config=SETTINGS, guarantee_dtype="float32")
    routers.save(FOLDER / "whole.safetensors")
    return router_file.read(FOLDER / "whole.safetensors")


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the files of this module lie."""
    globals()["FOLDER"] = tmp_path_factory.mktemp("routers")


FOLDER = Path()


def signed(content: bytes) -> bytes:
    """The same content with the digest that it ought to have."""
    unsigned = re.sub(rb'"sha256":"[^"]*"', b'"sha256":"' + b"0" * 64 + b'"', content, count=1)
    digest = hashlib.sha256(unsigned).hexdigest().encode()
    return unsigned.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest, 1)


def load(content: bytes) -> Routers:
    path = FOLDER / "routers.safetensors"
    path.write_bytes(content)
    return Routers.load(path, model=MODEL)


def refused(content: bytes, expected: str | None = None) -> None:
    with pytest.raises(TideError, match=expected) as caught:
        load(content)
    assert len(str(caught.value).replace(str(FOLDER), "")) <= 300
    assert "\n" not in str(caught.value)
    assert "routers.safetensors" in str(caught.value)


def test_no_bit_of_a_file_can_be_changed() -> None:
    """All of the header, and of the tensors every 97th."""
    metadata = {"exit_config": SETTINGS, "guarantee_dtype": "float32", "exit_points": [1]}
    rng = np.random.default_rng(0)
    tensors = {"1.down": rng.normal(size=(48, 4)), "1.factor.0": rng.normal(size=(48, 48)), "1.up_bias": np.zeros(())}
    content = router_file.encode(tensors, metadata)
    assert signed(content) == content
    header = 8 * (8 + int.from_bytes(content[:8], "little"))
    path = FOLDER / "flipped.safetensors"
    path.write_bytes(content)
    router_file.read(path)
    with path.open("r+b", buffering=0) as file:
        for bit in [*range(header), *range(header, 8 * len(content), 97)]:
            at, flipped = bit // 8, content[bit // 8] ^ (1 << bit % 8)
            os.pwrite(file.fileno(), bytes([flipped]), at)
            with pytest.raises(TideError):
                router_file.read(path)
            os.pwrite(file.fileno(), content[at : at + 1], at)
    router_file.read(path)


@pytest.mark.matrix
@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_no_byte_can_be_missing_or_more(cut: int) -> None:
    content = router_file.encode(*whole())
    refused(content[:cut], "damaged")
    refused(content + b"\0", "damaged")
    refused(content[:200] + content[201:], "damaged")


def test_what_is_saved_is_accepted() -> None:
    found = load(router_file.encode(*whole()))
    assert found.exit_config == ExitConfig.from_dict(SETTINGS)
    assert found.heads is not None
    assert found.translators is not None


NUMBERS = [-3.05, -1e-9, float("nan"), float("inf"), float("-inf"), 1e308, True, "0.02", None, [], {}, 2**70]


@pytest.mark.parametrize("name", [name for name in PROMISE.to_dict() if name not in ("loss", "kv_strategy")])
def test_every_number_of_a_promise_is_checked(name: str) -> None:
    values = PROMISE.to_dict()
    for number in NUMBERS:
        if name == "prefill_exits" and number is True:
            continue
        with pytest.raises(TideError) as caught:
            RiskGuarantee.from_dict(values | {name: number})
        assert "\n" not in str(caught.value)
    refused(router_file.encode(*whole(exit_config=SETTINGS | {"guarantee": values | {name: -3.05}})), "exit settings")


def test_a_p_value_above_delta_promises_nothing() -> None:
    values = PROMISE.to_dict() | {"p_value": 0.06}
    with pytest.raises(TideError, match="exceeds delta"):
        RiskGuarantee.from_dict(values)
    RiskGuarantee(**values)  # as a threshold that did not pass is recorded


@pytest.mark.parametrize(
    "values",
    [
        {"loss": 3},
        {"loss": "two\nlines"},
        {"kv_strategy": ["propagate"]},
        {"risk": 1.5},
        {"observed": 1.01},
        {"sequences": 0},
        {"exit_threshold": [0.5, 1.5]},
        {"exit_threshold": []},
    ],
)
def test_promises_that_cannot_be(values: dict[str, Any]) -> None:
    settings = SETTINGS | {"guarantee": PROMISE.to_dict() | values}
    if values == {"exit_threshold": []}:
        settings |= values
    refused(router_file.encode(*whole(exit_config=settings)), "exit settings|0 thresholds")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["1.down", "1.up_bias", "1.factor.0", "translators.3.shift"])
def test_weights_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    tensors, metadata = whole()
    tensors[name] = tensors[name].copy()
    tensors[name][...] = value
    refused(router_file.encode(tensors, metadata), f"{re.escape(name)} holds NaN or infinity")


def test_routers_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    first, *others = made_for(MODEL).routers
    routers = dataclasses.replace(made_for(MODEL), routers=(first._replace(up=first.up * np.nan), *others))
    with pytest.raises(TideError, match=r"not written: tensor 1\.up of these routers holds NaN"):
        routers.save(tmp_path / "routers.safetensors")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ anything

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["fingerprint", "model", "config", "report", "exit_config", "no_guarantee", "guarantee_dtype", "exit_points"]
ANYTHING = settings(max_examples=EXAMPLES, derandomize=True, deadline=None)


def only_tide_error(content: bytes) -> None:
    try:
        found = load(content)
    except TideError:
        refused(content)
        return
    assert found.report is not None
    assert found.exit_config is None or isinstance(found.exit_config, ExitConfig)


@ANYTHING
@given(st.sampled_from(FIELDS), JSON)
def test_any_metadata_is_read_or_refused(name: str, value: Any) -> None:
    only_tide_error(router_file.encode(*whole(**{name: value})))


@ANYTHING
@given(st.sampled_from(list(SETTINGS)), st.sampled_from([*PROMISE.to_dict(), ""]), JSON)
def test_any_exit_setting_is_read_or_refused(name: str, promised: str, value: Any) -> None:
    values = SETTINGS | ({"guarantee": SETTINGS["guarantee"] | {promised: value}} if promised else {name: value})
    only_tide_error(router_file.encode(*whole(exit_config=values)))


@ANYTHING
@given(st.data())
def test_any_header_is_read_or_refused(data: st.DataObject) -> None:
    """With the digest that it ought to have."""
    content = router_file.encode(*whole())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        header[name] = data.draw(JSON)
    else:
        key = data.draw(st.sampled_from(sorted(header[name])))
        header[name][key] = data.draw(JSON | st.sampled_from(["I64", "F64", "BOOL", "BF16", "F8_E4M3", "?"]))
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    only_tide_error(signed(len(text).to_bytes(8, "little") + text + content[8 + length :]))


@ANYTHING
@given(st.binary(max_size=64), st.integers(0, 3000), st.integers(0, 40))
def test_any_bytes_are_read_or_refused(new: bytes, start: int, length: int) -> None:
    content = router_file.encode(*whole())
    content = content[:start] + new + content[start + length :]
    only_tide_error(content)
    only_tide_error(signed(content))


def test_the_file_belongs_to_the_model() -> None:
    tensors, metadata = whole()
    refused(router_file.encode(tensors, metadata | {"fingerprint": "0" * 16, "model": "x" * 1000}), "calibrated for")
    assert metadata["fingerprint"] == model_identity(MODEL)["fingerprint"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files on this system")
def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """A rename puts a file in the place of anything: of /dev/null, too, where root runs it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(TideError, match="it is a device or a pipe, expected a file"):
            router_file.write(tmp_path / name, router_file.encode(*whole()))
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]
