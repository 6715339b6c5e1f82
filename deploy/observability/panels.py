"""The few parts of a Grafana dashboard that ours are made of, as JSON for Grafana 10 and later.

dashboard("neo-tiers", "NEO: tiers", [row("Tokens", panel(...), panel(...)), ...])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WIDTH = 24
HEIGHT = 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """One line, or several, of a panel."""

    expression: str
    """PromQL; `$model`, `$instance` and `$__rate_interval` are Grafana's to fill in."""
    legend: str
    """May name labels, as {{label}}."""


@dataclass(frozen=True)
class Panel:
    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    """Grafana's name for it: s, Bps, percentunit, reqps, short, bytes."""
    help: str = ""
    """What a good graph looks like."""
    stacked: bool = False
    kind: str = "timeseries"
    """`timeseries` or `stat`."""
    most: float | None = None
    """Top of the axis; None lets Grafana choose."""

    def render(self, identity: int, x: int, y: int, width: int) -> dict[str, Any]:
        custom: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 30 if self.stacked else 5}
        if self.stacked:
            custom["stacking"] = {"mode": "normal", "group": "A"}
        defaults: dict[str, Any] = {"unit": self.unit, "min": 0, "custom": custom}
        if self.most is not None:
            defaults["max"] = self.most
        options: dict[str, Any] = {"tooltip": {"mode": "multi", "sort": "desc"}}
        if self.kind == "stat":
            del defaults["custom"]
            options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}
        return {
            "id": identity,
            "type": self.kind,
            "title": self.title,
            "description": self.help,
            "datasource": DATASOURCE,
            "gridPos": {"h": HEIGHT, "w": width, "x": x, "y": y},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": options,
            "targets": [
                {
                    "refId": chr(ord("A") + place),
                    "datasource": DATASOURCE,
                    "expr": query.expression,
                    "legendFormat": query.legend,
                    "range": True,
                    "exemplar": "_bucket" in query.expression,
                }
                for place, query in enumerate(self.queries)
            ],
        }


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]
    """Side by side, equally wide."""


@dataclass(frozen=True)
class Dashboard:
    uid: str
    """Also the name of its file."""
    title: str
    variables: tuple[tuple[str, str], ...]
    """Name and query of each variable but the data source."""
    rows: tuple[Row, ...]

    def render(self) -> dict[str, Any]:
        panels: list[dict[str, Any]] = []
        y = 0
        for row in self.rows:
            panels.append(
                {
                    "id": len(panels) + 1,
                    "type": "row",
                    "title": row.title,
                    "collapsed": False,
                    "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
                    "panels": [],
                }
            )
            y += 1
            width = WIDTH // len(row.panels)
            for place, panel in enumerate(row.panels):
                panels.append(panel.render(len(panels) + 1, place * width, y, width))
            y += HEIGHT
        return {
            "uid": self.uid,
            "title": self.title,
            "tags": ["neo-serving"],
            "schemaVersion": 39,
            "version": 1,
            "editable": True,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "timezone": "browser",
            "templating": {"list": [_datasource(), *map(_variable, self.variables)]},
            "annotations": {"list": []},
            "panels": panels,
        }


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
    }


def _variable(named: tuple[str, str]) -> dict[str, Any]:
    name, query = named
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": f"var-{name}"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "sort": 1,
    }
