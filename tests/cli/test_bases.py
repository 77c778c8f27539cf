from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llamahome.cli.bases import base_digest, check_base, check_name
from llamahome.errors import InvalidConfig, InvalidData, NotFound


@pytest.mark.parametrize("name", ["a", "tiny", "qwen3-0.6b", "0", "a" * 64, "llama_3.1"])
def test_a_short_lower_case_name_is_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a:b", "Qwen/Qwen3", "Tiny", ".hidden", "-x", "a" * 65, "a\n"]
)
def test_a_name_that_clients_or_urls_would_take_apart_is_refused(name: str) -> None:
    with pytest.raises(InvalidConfig, match="is not a base name"):
        check_name(name)


def test_a_refused_hub_name_comes_with_a_usable_one() -> None:
    with pytest.raises(InvalidConfig) as refused:
        check_name("Qwen/Qwen3-0.6B")
    assert refused.value.remedy == "For example qwen3-0.6b"


def test_the_digest_is_the_sha256_over_names_and_file_digests(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    lines = [
        f"{hashlib.sha256(b'one').hexdigest()}  a\n",
        f"{hashlib.sha256(b'two').hexdigest()}  b\n",
    ]
    assert base_digest(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_digest_changes_with_a_byte_a_name_or_a_file_and_with_nothing_else(
    base_folder: Path,
) -> None:
    before = base_digest(base_folder)
    (base_folder / ".cache").mkdir()
    (base_folder / ".cache" / "download.lock").write_text("x")
    assert base_digest(base_folder) == before
    (base_folder / "model.safetensors").write_bytes(b"\x00" * 63 + b"\x01")
    changed = base_digest(base_folder)
    (base_folder / "tokenizer.json").rename(base_folder / "tokenizer2.json")
    assert len({before, changed, base_digest(base_folder)}) == 3


def test_files_in_folders_below_count_too(base_folder: Path) -> None:
    before = base_digest(base_folder)
    (base_folder / "extra").mkdir()
    (base_folder / "extra" / "adapter.safetensors").write_bytes(b"1")
    assert base_digest(base_folder) != before


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_without_a_needed_file_is_refused_by_the_files_name(
    base_folder: Path, missing: str
) -> None:
    (base_folder / missing).unlink()
    with pytest.raises(NotFound, match=missing.replace("model", r"\*")):
        check_base(base_folder)


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.bin", "deep/weights.pt", "x.pkl"])
def test_a_file_that_can_run_code_is_refused_by_its_name(base_folder: Path, name: str) -> None:
    (base_folder / name).parent.mkdir(exist_ok=True)
    (base_folder / name).write_text("")
    with pytest.raises(InvalidData, match="can run code") as refused:
        check_base(base_folder)
    assert refused.value.place.file == str(base_folder / name)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ['{"auto_map": {}}', '{"text_config": {"auto_map": {}}}'])
def test_an_auto_map_is_refused_wherever_it_stands(
    base_folder: Path, file: str, content: str
) -> None:
    (base_folder / file).write_text(content)
    with pytest.raises(InvalidData, match="auto_map"):
        check_base(base_folder)


def test_a_broken_config_is_named(base_folder: Path) -> None:
    (base_folder / "config.json").write_text("{")
    with pytest.raises(InvalidData, match="is not JSON"):
        check_base(base_folder)


def test_a_good_folder_passes(base_folder: Path) -> None:
    check_base(base_folder)
