"""The dev overlay's pods, run here as a kubelet would: in order, probed by gRPC, stopped in
order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from neo_client import Client, Sampling
from neo_common.grpc.health import HOST_TIER, LIVENESS
from tests.support.manifests import overlay
from tests.support.pod import Pod
from tests.support.stack import stack_model

SMALL = {
    "NEO_GPU_KV_GIB": "0.0625", "NEO_HOST_KV_GIB": "0.0625", "NEO_DTYPE": "float32",
    "NEO_THREADS": "1", "NEO_OFFLOAD": "always", "NEO_OFFLOAD_MODE": "inline",
}  # fmt: skip
"""Of the gpu_service here: a tiny model, and every request through the cpu_service."""
SECONDS = 120.0
"""Far beyond what a call takes."""


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    model = stack_model(tmp_path / "model")
    pod = Pod(overlay("dev-kind"), tmp_path / "root")
    pod.override("gpu-service", {**SMALL, "NEO_MODEL": str(model)})
    pod.override("router", {"NEO_BACKENDS": f"127.0.0.1:{pod.port('7001')}"})
    yield pod
    pod.stop()


def test_a_pods_life(pod: Pod, tmp_path: Path) -> None:
    doctor = pod.start("doctor")
    assert doctor.wait(timeout=120) == 0, pod.log("doctor")
    written = yaml.safe_load((tmp_path / "root/run/neo/gpu_service.yaml").read_text())
    assert written["host_kv_gib"] > 0

    cpu = pod.start("cpu-service")
    pod.wait("cpu-service", "startupProbe")
    gpu = pod.start("gpu-service")
    router = pod.start("router")
    pod.wait("gpu-service", "startupProbe")
    pod.wait("gpu-service", "livenessProbe", service=HOST_TIER)
    pod.wait("router", "readinessProbe")

    with Client(f"127.0.0.1:{pod.port('7000')}") as client:
        answer = client.generate(
            [1, 2, 3], sampling=Sampling(max_tokens=4, ignore_eos=True), deadline_seconds=SECONDS
        )
        assert answer.usage.host_tokens >= 3  # the prompt's last row gives the first

        # The cpu_service dies: degraded and said so, not unready; the kubelet starts it again.
        cpu.kill()
        cpu.wait()
        pod.wait("gpu-service", "livenessProbe", serving=False, service=HOST_TIER)
        pod.wait("gpu-service", "readinessProbe")
        cpu = pod.start("cpu-service")
        pod.wait("gpu-service", "livenessProbe", service=HOST_TIER)

        # The pod is told to go in the middle of a stream, which finishes all the same.
        sampling = Sampling(max_tokens=300, ignore_eos=True)
        with client.stream([1, 2, 3], sampling=sampling, deadline_seconds=SECONDS) as messages:
            next(messages)
            gpu.send_signal(signal.SIGTERM)
            pod.wait("gpu-service", "readinessProbe", serving=False)
            pod.wait("gpu-service", "livenessProbe", service=LIVENESS)
            usage = [message.usage for message in messages][-1]
        assert usage.completion_tokens == 300
    assert gpu.wait(timeout=60) == 0, pod.log("gpu-service")
    # Only now the sidecar: it has nothing left to wait for.
    cpu.send_signal(signal.SIGTERM)
    assert cpu.wait(timeout=60) == 0, pod.log("cpu-service")
    router.send_signal(signal.SIGTERM)
    assert router.wait(timeout=60) == 0, pod.log("router")
