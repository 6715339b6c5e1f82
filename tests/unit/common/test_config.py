"""Settings: precedence, types, and errors that name the setting."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from cpu_service.config import CpuServiceConfig
from gpu_service.config import GpuServiceConfig
from neo_common.config import ConfigError, dump, field_docs, load, read_environment
from router.config import RouterConfig


@dataclass(frozen=True)
class Sample:
    name: str = "default"
    """A text."""
    count: int = 1
    """A number;
    over two lines."""
    share: float = 0.5
    """A fraction of 100%."""
    active: bool = False
    """A switch."""
    peers: tuple[str, ...] = ()
    """A list."""

    def validate(self) -> None:
        if self.count > 10:
            raise ValueError("count must be at most 10")


def read(*argv: str, environment: dict[str, str] | None = None) -> Sample:
    return load(Sample, argv, prog="sample", description="", environment=environment or {})


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: file\ncount: 2\nshare: 1\n")
    environment = {"NEO_NAME": "environment", "NEO_COUNT": "3", "NEO_UNRELATED": "x"}
    config = read("--config", str(file), "--name", "flag", environment=environment)
    assert config == Sample(name="flag", count=3, share=1.0)


@pytest.mark.parametrize("name", ["NEO_COUNTT", "NEO_ACTVE", "NEO_PEER"])
def test_a_slip_in_the_environment_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}; did you mean NEO_"):
        read(environment={name: "1"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cuont", "3"], "unknown flag --cuont; did you mean --count?"),
        (["--cuont=3"], "unknown flag --cuont; did you mean --count?"),
        (["--print-confg"], "did you mean --print-config?"),
        (["--zzz", "3"], "unknown flag --zzz; see --help"),
        (["count=3"], "unexpected argument 'count=3'"),
        (["--coun", "3"], "did you mean --count?"),
    ],
)
def test_unknown_flags_are_errors_with_the_nearest_name(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*flags)
    assert message in str(caught.value)


def test_other_names_in_the_environment_are_left_alone() -> None:
    """The kernel's, those that Kubernetes makes of Services, and other services' settings."""
    services = {
        "gpu_service": GpuServiceConfig,
        "cpu_service": CpuServiceConfig,
        "router": RouterConfig,
    }
    names = {f"NEO_{field.name.upper()}" for cls in services.values() for field in fields(cls)}
    names |= {"NEO_CPU_ISA"}
    for service in ("ROUTER", "GPU_SERVICE", "CPU_SERVICE"):
        names |= {f"NEO_{service}_{end}" for end in ("SERVICE_HOST", "SERVICE_PORT", "PORT")}
        names.add(f"NEO_{service}_PORT_7001_TCP_ADDR")
    for cls in services.values():
        own = {f"NEO_{field.name.upper()}" for field in fields(cls)}
        read_environment(cls, dict.fromkeys(names - own, "1"))


def test_lists_and_switches() -> None:
    config = read("--peers", "a:1, b:2", environment={"NEO_ACTIVE": "true"})
    assert config == Sample(peers=("a:1", "b:2"), active=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont: 1", "did you mean count"),
        ("zzz: 1", "known are"),
        ("count: many", "count must be a whole number"),
        ("count: 1.5", "count must be a whole number"),
        ("count: true", "count must be a whole number"),
        ("share: .nan", "share must be finite"),
        (f"share: {10**400}", "share is too large"),
        ("active: maybe", "active must be true or false"),
        ("name: [1]", "name must be text"),
        ("peers: 3", "peers must be a list"),
        ("count: 11", "count must be at most 10"),
        ("[1, 2]", "must hold a mapping"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read("--config", str(file))


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read("--config", "no/such/file")


def test_print_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--peers", "a", "--print-config")
    assert ended.value.code == 0
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    assert read("--config", str(file)) == Sample(peers=("a",))


@pytest.mark.parametrize("config", [GpuServiceConfig, CpuServiceConfig, RouterConfig, Sample])
def test_every_setting_is_documented_and_printable(config: type) -> None:
    instance = config()
    assert set(field_docs(config)) == set(instance.__dataclass_fields__)
    assert dump(instance)


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert "A number; over two lines." in text
    assert "100%" in text
    assert all(f"--{name}" in text for name in ("name", "count", "share", "active", "peers"))
