"""All dashboards."""

from __future__ import annotations

from deploy.observability.dashboard_requests import OVERVIEW
from deploy.observability.dashboard_routers import FLEET
from deploy.observability.dashboard_tiers import TIERS

DASHBOARDS = (OVERVIEW, TIERS, FLEET)
