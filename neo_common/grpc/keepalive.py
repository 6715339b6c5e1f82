"""Finds connections whose other end has gone without a word."""

from __future__ import annotations

Options = tuple[tuple[str, int], ...]


def keepalive(silent_seconds: float, answer_seconds: float) -> Options:
    """gRPC's options for a channel or a server: a ping after so much silence, and the connection is
    closed, with all its calls, when no answer comes within `answer_seconds`.

    gRPC 1.85 closes it by the time-out of all pings, 60 s unless said otherwise, whatever that of
    keepalive says: calls to a peer that had gone went on for 90 s where 50 were meant. And it sends
    no more than two pings, then one a minute, on a connection on which it has nothing to say.
    """
    answer_ms = round(1000 * answer_seconds)
    return (
        ("grpc.keepalive_time_ms", round(1000 * silent_seconds)),
        ("grpc.keepalive_timeout_ms", answer_ms),
        ("grpc.http2.ping_timeout_ms", answer_ms),
        ("grpc.http2.max_pings_without_data", 0),
    )
