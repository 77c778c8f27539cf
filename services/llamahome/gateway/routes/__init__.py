"""The HTTP surface: each handler names its parameters and calls one service."""

from llamahome.gateway.routes.files import router as files_router
from llamahome.gateway.routes.fleet import router as fleet_router
from llamahome.gateway.routes.jobs import router as jobs_router
from llamahome.gateway.routes.models import router as models_router
from llamahome.gateway.routes.results import router as results_router

ROUTERS = (files_router, jobs_router, results_router, models_router, fleet_router)

__all__ = ["ROUTERS"]
