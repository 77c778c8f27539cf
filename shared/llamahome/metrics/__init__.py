"""Every Prometheus series, once: the catalogue, and the page a process serves."""

from llamahome.metrics.catalogue import CATALOGUE, Series, reason_label
from llamahome.metrics.serve import MetricsServer, family, process_registry

__all__ = [
    "CATALOGUE",
    "MetricsServer",
    "Series",
    "family",
    "process_registry",
    "reason_label",
]
