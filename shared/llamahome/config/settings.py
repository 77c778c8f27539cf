"""``Settings``: where this process runs. Built once at the entry and passed down.

Sources, later beats earlier: defaults < the YAML file named by LLAMAHOME_SETTINGS (or
``configs/settings.yaml``) < environment ``LLAMAHOME_*`` < arguments; an empty variable is not set.
With a state folder everything not given is derived from it, so one folder is a whole fleet on one
machine.
"""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from llamahome.config.strict_yaml import is_there, read_yaml_mapping
from llamahome.config.training import shown
from llamahome.errors import InvalidConfig, nearest

SETTINGS_ENV = "LLAMAHOME_SETTINGS"
SETTINGS_PATH = Path("configs/settings.yaml")
DEFAULT_STATE = Path(".llamahome")


class Settings(BaseSettings):
    """One process's surroundings. URLs may hold passwords: never log a Settings object whole."""

    model_config = SettingsConfigDict(
        env_prefix="LLAMAHOME_", env_ignore_empty=True, extra="forbid", frozen=True
    )

    state: Path | None = Field(default=None, description="folder of a one-machine fleet")
    redis_url: str | None = Field(default=None, repr=False)
    ledger_url: str | None = Field(default=None, repr=False)
    storage_url: str | None = None
    url: str | None = Field(default=None, description="the gateway, for clients")
    key: SecretStr | None = Field(default=None, description="the API key, for clients")

    gateway_host: str = "127.0.0.1"
    gateway_port: int = Field(default=0, ge=0, le=65535, description="0 is any free port")
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535, description="0 is any free port")
    host: str = Field(default_factory=socket.gethostname, description="this host's name")

    lease_seconds: float = Field(default=30.0, gt=0)
    sweep_seconds: float = Field(default=1.0, gt=0)
    rering_seconds: float = Field(
        default=8.0, gt=0, description="a ready run unrung so long is rung"
    )
    heartbeat_seconds: float = Field(default=5.0, gt=0)
    stall_seconds: float = Field(default=900.0, gt=0, description="no progress for so long: killed")
    drain_seconds: float = Field(default=20.0, gt=0, description="time to save when asked to stop")
    claim_seconds: float = Field(default=5.0, gt=0, description="a worker claims on for so long")
    max_attempts: int = Field(default=3, ge=1)
    retry_seconds: float = Field(default=1.0, gt=0, description="first backoff; then x 4 each time")

    shard_bytes: int = Field(default=4 * 1024 * 1024, gt=0)
    max_file_bytes: int = Field(default=8 * 1024**3, gt=0)
    quota_active_jobs: int | None = Field(default=None, ge=1)
    uri_allowlist: Annotated[tuple[str, ...], NoDecode] = ()
    webhook_allowlist: Annotated[tuple[str, ...], NoDecode] = ()
    scratch: Path | None = Field(default=None, description="local folder for attempts")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0, description="torch CPU threads; 0 is all cores")
    slots: int = Field(default=8, ge=1, description="jobs of one base trained side by side")
    tick_tokens: int = Field(default=0, ge=0, description="tokens of one pass; 0 is as suits")
    memory_bytes: int | None = Field(
        default=None, gt=0, description="activations' limit; unset: what the device has free"
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _YamlSource(settings_cls)

    @cached_property
    def ledger(self) -> str:
        """SQLAlchemy URL of the ledger."""
        if self.ledger_url:
            return self.ledger_url
        return f"sqlite:///{self._url_below_state('ledger.sqlite3', 'LLAMAHOME_LEDGER_URL')}"

    @cached_property
    def storage(self) -> str:
        """fsspec URL of the storage root."""
        if self.storage_url:
            return self.storage_url
        return f"file://{self._url_below_state('storage', 'LLAMAHOME_STORAGE_URL')}"

    @cached_property
    def redis(self) -> str:
        """kombu URL of the broker; by default the private server of the state folder."""
        if self.redis_url:
            return self.redis_url
        return f"redis+socket://{private_redis_socket(self._state('LLAMAHOME_REDIS_URL'))}"

    @cached_property
    def endpoint_file(self) -> Path:
        return (self.state or DEFAULT_STATE) / "endpoint.json"

    @cached_property
    def scratch_root(self) -> Path:
        """Where attempts keep their local files; on a fast local disk in a real fleet."""
        if self.scratch is not None:
            return self.scratch
        if self.state is not None:
            return self.state.resolve() / "scratch"
        return Path(tempfile.gettempdir()) / f"llamahome-scratch-{os.getuid()}"

    def _state(self, variable: str) -> Path:
        if self.state is None:
            raise InvalidConfig(
                "not set, and there is no state folder to derive it from", field=variable,
                remedy="Set it, or name a state folder with --state or LLAMAHOME_STATE",
            )  # fmt: skip
        return self.state.resolve()

    def _url_below_state(self, name: str, variable: str) -> str:
        """A path as it stands in a URL, where ``?``, ``#`` and ``%`` have meanings."""
        return quote(str(self._state(variable) / name))


class _YamlSource(PydanticBaseSettingsSource):
    """The settings file, where there is one."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise AssertionError("the whole file is read at once")

    def __call__(self) -> dict[str, Any]:
        named = os.environ.get(SETTINGS_ENV)
        path = Path(named) if named else SETTINGS_PATH
        if not named and not is_there(path):
            return {}
        return read_yaml_mapping(path)


def load_settings(**arguments: Any) -> Settings:
    """Settings from all sources; arguments that are None count as not given.

    Raises InvalidConfig naming the variable, its value and the remedy.
    """
    _refuse_unknown_variables()
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in ("uri_allowlist", "webhook_allowlist"):
        text = os.environ.get(f"LLAMAHOME_{name.upper()}")
        if name not in given and text:
            given[name] = tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return Settings(**given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        if problem["type"] == "extra_forbidden":
            raise InvalidConfig(
                "unknown setting", code="unknown_parameter", field=name,
                remedy=nearest(name, Settings.model_fields),
            ) from None  # fmt: skip
        raise InvalidConfig(
            f"{problem['msg']}, not {shown(problem.get('input'))}",
            field=f"LLAMAHOME_{name.upper()}",
        ) from None


# Read outside Settings, each by the one function that documents it.
_OTHER_VARIABLES = frozenset(
    {"LLAMAHOME_SETTINGS", "LLAMAHOME_TRAINING_CONFIG", "LLAMAHOME_CRASH_AT"}
)


def _refuse_unknown_variables() -> None:
    known = {f"LLAMAHOME_{name.upper()}" for name in Settings.model_fields} | _OTHER_VARIABLES
    for name in os.environ:
        if (
            name.startswith("LLAMAHOME_")
            and name not in known
            and not name.startswith("LLAMAHOME_TEST_")
        ):
            raise InvalidConfig(
                "unknown environment variable", code="unknown_parameter", field=name,
                remedy=nearest(name, known),
            )  # fmt: skip


def private_redis_socket(state: Path) -> Path:
    """The Unix socket of a state folder's own Redis, the same for every process that asks.

    In a short folder of mode 0700 under the runtime or temp directory, because a socket path over
    107 bytes is silently cut (sun_path in unix(7)).
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(runtime) if runtime and Path(runtime).is_dir() else Path(tempfile.gettempdir())
    name = hashlib.sha256(str(state.resolve()).encode()).hexdigest()[:12]
    return root / f"llamahome-{os.getuid()}-{name}" / "redis.sock"
