"""The client for other services: enqueue a job, watch it, fetch its adapter.

Light on purpose: pydantic and an HTTP client, no queue, no database, no torch.
``llamahome.client.fake`` has an in-memory server for the tests of whoever uses it.
"""

from llamahome.client.client import Client
from llamahome.client.objects import (
    ArtifactInfo,
    EventInfo,
    JobInfo,
    ModelInfo,
    Progress,
    StoredFileInfo,
)

__all__ = [
    "ArtifactInfo",
    "Client",
    "EventInfo",
    "JobInfo",
    "ModelInfo",
    "Progress",
    "StoredFileInfo",
]
