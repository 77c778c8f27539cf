from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

pytestmark = pytest.mark.model


def test_tensors_that_cannot_be_written_are_an_os_error_with_its_number(tmp_path: Path) -> None:
    import torch

    from llamahome.training.tensors import save_tensors

    tensors = {"a": torch.ones(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_tensors(tensors, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(FileNotFoundError):
        save_tensors(tensors, tmp_path / "no" / "a.safetensors")
