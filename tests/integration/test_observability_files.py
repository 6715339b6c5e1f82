"""Dashboards and rules as they are in the repository: current, tested, and each alert answered."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from deploy.observability import generate
from deploy.observability.alerts import ALERTS
from tests.support.prometheus import binary
from tests.support.stack import REPO

TESTS = generate.HERE / "alerts" / "neo.rules.test.yaml"


def test_files_are_what_the_definitions_make() -> None:
    for path, text in generate.render().items():
        assert path.read_text() == text, f"run python -m deploy.observability.generate: {path.name}"


def test_rules_pass_promtools_tests() -> None:
    command = [binary("promtool"), "test", "rules", str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_to_fire_and_to_keep_quiet() -> None:
    fires, quiet = set(), set()
    for group in yaml.safe_load(TESTS.read_text())["tests"]:
        for case in group["alert_rule_test"]:
            (fires if case.get("exp_alerts") else quiet).add(case["alertname"])
    names = {alert.name for alert in ALERTS}
    assert fires == names
    assert quiet == names


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_every_alert_has_an_answer(alert: object) -> None:
    assert isinstance(alert, type(ALERTS[0]))
    page, anchor = alert.render()["annotations"]["runbook_url"].split("#")
    sections = re.split(r"^## ", (REPO / page).read_text(), flags=re.M)
    (answer,) = [s for s in sections if s.split("\n")[0].lower() == anchor]
    assert f"`{alert.severity}`" in answer
    assert "- Look:" in answer
    assert "- Do:" in answer


def test_no_answer_without_an_alert() -> None:
    headings = re.findall(r"^## (.+)$", (REPO / "docs/alerts.md").read_text(), flags=re.M)
    assert headings == [alert.name for alert in ALERTS]
