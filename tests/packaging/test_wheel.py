"""The wheel as users get it: light without extras, whole with them, in an empty directory."""

from __future__ import annotations

import email
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = sysconfig.get_paths()["purelib"]
pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--disable-pip-version-check", "--wheel-dir", str(folder), str(ROOT),
        ],
        check=True,
    )  # fmt: skip
    (built,) = folder.glob("llamahome-*.whl")
    return built


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _python(code: str, cwd: Path, *path: str) -> subprocess.CompletedProcess[str]:
    """Python that sees only ``path``: -S processes no .pth, so no editable install shadows."""
    start = f"import sys; sys.path[:0] = {list(path)!r}\n"
    return subprocess.run(
        [sys.executable, "-S", "-c", start + code],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_without_an_extra_it_needs_pydantic_and_an_http_client_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    always = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(need.split("<")[0].split(">")[0] for need in always) == ["httpx2", "pydantic"]


def test_nothing_is_packed_that_would_collide_or_does_not_belong(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"llamahome"}
    assert "llamahome/__init__.py" not in names, "it is a namespace package"
    assert not [name for name in names if "tests" in name.split("/")]


def test_every_room_is_typed(unpacked: Path) -> None:
    rooms = [path for path in (unpacked / "llamahome").iterdir() if path.is_dir()]
    assert len(rooms) == 16
    for room in rooms:
        assert (room / "py.typed").is_file(), room.name
        assert (room / "__init__.py").is_file(), room.name


def test_the_command_without_extras_says_which_one_to_install(
    unpacked: Path, tmp_path: Path
) -> None:
    code = "import sys; from llamahome.cli import main; sys.exit(main())"
    done = _python(code, tmp_path, str(unpacked))
    assert done.returncode == 2
    assert "llamahome[fleet]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_client_alone_imports_nothing_of_the_fleet(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import llamahome.client, sys\n"
        "heavy = {'celery', 'redis', 'torch', 'sqlalchemy', 'fastapi', 'yaml', 'structlog'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
        "assert llamahome.client.__file__.startswith(sys.path[0]), llamahome.client.__file__\n"
    )
    done = _python(code, tmp_path, str(unpacked), SITE)
    assert done.returncode == 0, done.stderr


def test_an_installed_wheel_works_in_an_empty_directory(unpacked: Path, tmp_path: Path) -> None:
    """Defaults, recipes, samples and migrations are package data."""
    code = (
        "from llamahome.config import recipes, resolve_training_config\n"
        "from llamahome.ledger import Ledger\n"
        "from importlib import resources\n"
        "assert resolve_training_config(environ={}).epochs == 3\n"
        "assert 'quick' in recipes()\n"
        "ledger = Ledger('sqlite:///ledger.sqlite3')\n"
        "ledger.upgrade(); ledger.check_revision()\n"
        "samples = resources.files('llamahome.conversations') / 'samples' / 'support.jsonl'\n"
        "assert len(samples.read_text(encoding='utf-8').splitlines()) >= 200\n"
        "import sys; sys.argv = ['llamahome', 'recipes']\n"
        "from llamahome.cli import main\n"
        "sys.exit(main())\n"
    )
    done = _python(code, tmp_path, str(unpacked), SITE)
    assert done.returncode == 0, done.stderr
    assert "quick" in done.stdout
