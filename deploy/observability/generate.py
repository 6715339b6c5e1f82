"""Writes the Grafana dashboards and the Prometheus rules from their definitions.

python -m deploy.observability.generate            write
python -m deploy.observability.generate --check    exit 1 when a file is not current
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from deploy.observability.alerts import rules
from deploy.observability.dashboards import DASHBOARDS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MONITORING = ROOT / "deploy" / "k8s" / "components" / "monitoring"
RULES_HEAD = "# Written by python -m deploy.observability.generate; do not edit.\n"


def render() -> dict[Path, str]:
    """File -> what it holds."""
    files = {
        HERE / "dashboards" / f"{dashboard.uid}.json": json.dumps(dashboard.render(), indent=1)
        + "\n"
        for dashboard in DASHBOARDS
    }
    text = yaml.safe_dump(rules(), sort_keys=False, width=120)
    files[HERE / "alerts" / "neo.rules.yaml"] = RULES_HEAD + text
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "neo-serving"},
        "spec": rules(),
    }
    text = yaml.safe_dump(resource, sort_keys=False, width=120)
    files[MONITORING / "prometheusrule.yaml"] = RULES_HEAD + text
    return files


def main() -> int:
    stale = [
        path for path, text in render().items() if not path.exists() or path.read_text() != text
    ]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current", file=sys.stderr)
        return 1 if stale else 0
    for path, text in render().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
