"""``adapter_config.json`` comes from anywhere: it is read, or refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamahome.config import read_adapter_config
from llamahome.errors import InvalidConfig

GOOD: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "r": 4, "lora_alpha": 8, "use_rslora": False,
    "target_modules": ["v_proj", "q_proj"], "base_model_name_or_path": "tiny",
    "init_lora_weights": True, "trainable_token_indices": None, "modules_to_save": None,
    "use_dora": False, "rank_pattern": {}, "layers_to_transform": None,
}  # fmt: skip
DEEP: list[Any] = []
for _ in range(500):
    DEEP = [DEEP]
WRONG = (
    None, True, False, 0, 5, -1, 10**18, 10**400, 1.5, float("nan"), float("inf"), "", "x",
    "\ud800", [], [None], [5], [True], ["a", 5], [["a"]], [""], ["a", "a"], {}, {"a": 3},
    {"a": None}, {"a": [True]}, {"a": ["x"]}, {"a": {}}, {"a": [1], "b": [2]}, DEEP,
)  # fmt: skip


def _read(**changed: Any) -> Any:
    return read_adapter_config(json.dumps({**GOOD, **changed}).encode(), "bot")


def _refusal(**changed: Any) -> str | None:
    try:
        _read(**changed)
    except InvalidConfig as error:
        return str(error)
    return None


def test_an_adapter_is_read_with_what_decides_its_meaning() -> None:
    found = _read(trainable_token_indices={"embed_tokens": [64, 65], "lm_head": [64, 65]})
    assert (found.r, found.alpha, found.target_modules) == (4, 8.0, ("q_proj", "v_proj"))
    assert found.tokens == (64, 65)
    assert _read().tokens == _read(trainable_token_indices={}).tokens == ()
    assert _read(trainable_token_indices=[3, 7]).tokens == (3, 7)


@pytest.mark.parametrize(
    "value", [5, True, "x", {"a": 3}, {"a": None}, [True], [1.0], ["1"], [-1], [7, 3], [3, 3],
              {"a": [1], "b": [2]}, {"a": [1], "b": [True]}, [[1]]]
)  # fmt: skip
def test_token_ids_that_are_no_ascending_list_are_refused(value: Any) -> None:
    with pytest.raises(InvalidConfig, match="trainable_token_indices") as caught:
        _read(trainable_token_indices=value)
    assert caught.value.code == "invalid_adapter"


@pytest.mark.parametrize("field", GOOD)
def test_a_field_of_another_type_is_read_or_refused(field: str) -> None:
    for refusal in filter(None, (_refusal(**{field: value}) for value in WRONG)):
        assert "'bot'" in refusal or "adapter bot" in refusal
        assert len(refusal) < 1000


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules"])
def test_a_field_that_decides_the_meaning_may_not_be_missing(field: str) -> None:
    body = {key: value for key, value in GOOD.items() if key != field}
    with pytest.raises(InvalidConfig, match=field):
        read_adapter_config(json.dumps(body).encode(), "bot")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"]
)
def test_bytes_that_are_no_object_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidConfig, match="adapter 'bot' has"):
        read_adapter_config(content, "bot")
