"""`neo bench`: load on a server, and what came of it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import uvloop
from rich.console import Console

from neo_client.aio import AsyncClient
from neo_client.bench import result as results
from neo_client.bench.drive import Driver, Messages, Pace
from neo_client.bench.figures import flat
from neo_client.bench.load import Session, Wishes, fitted, make_sessions
from neo_client.bench.own import OwnLoad
from neo_client.bench.progress import show
from neo_client.bench.prompts import PromptMaker
from neo_client.bench.report.page import report
from neo_client.bench.server import agreement, describe, model_of, scrape
from neo_client.bench.summary import summary
from neo_client.bench.thresholds import Threshold, failures, parse
from neo_client.commands import bench_compare, bench_flags
from neo_client.commands.flags import connection_of, connection_settings
from neo_client.connect import Connection, Retries
from neo_client.fingerprint import fingerprint
from neo_client.options import Prompt, Sampling, Scheduling

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def add(subparsers: Any) -> None:
    parser = bench_flags.add(subparsers)
    actions = parser.add_subparsers(
        dest="action", required=False, metavar="ACTION", help="instead of a run"
    )
    bench_compare.add(actions)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    thresholds = [parse(text) for text in arguments.fail_if]
    bench_flags.check(arguments)
    for path in (arguments.json, arguments.html):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}")  # before minutes of load
    bench = Bench(arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(bench.run())
    return finish(arguments, result, thresholds)


def finish(
    arguments: argparse.Namespace, result: dict[str, Any], thresholds: list[Threshold]
) -> int:
    """Show and write the result; returns the exit code."""
    Console().print(summary(result), highlight=False)
    if arguments.json is not None:
        results.write(result, arguments.json)
    if arguments.html is not None:
        arguments.html.write_text(report([(arguments.name, result)]), encoding="utf-8")
    failed = failures(thresholds, flat(result))
    for sentence in failed:
        print(f"neo bench: failed: {sentence}", file=sys.stderr)
    if result["interrupted"]:
        return EXIT_INTERRUPTED
    if failed:
        return bench_flags.EXIT_THRESHOLD
    rates = result["figures"]["rates"]
    return EXIT_FAILED if rates["requests"] and rates["failed"] == rates["requests"] else 0


class Bench:
    """One run, from its options to its result."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises ValueError."""
        self._arguments = arguments
        self._wishes: Wishes = bench_flags.wishes_of(arguments)
        self._sessions = make_sessions(self._wishes)
        self._fleet = bench_flags.fleet_from(arguments)
        self._targets = bench_flags.targets_of(arguments)
        self._scheduling = Scheduling(
            arguments.placement, arguments.priority, arguments.ttft_ms, arguments.tpot_ms
        )

    async def run(self) -> dict[str, Any]:
        given = self._arguments
        # A retried request would be two, of which figures see one.
        settings = {**connection_settings(given), "retries": Retries(generations=1)}
        async with AsyncClient(**settings) as client:
            model = await model_of(client, given.model)
            if self._wishes.prompts is None and model.vocab_size < 2:
                raise ValueError(
                    "the server does not say how large its vocabulary is; send --prompts"
                )
            sessions, changed = self._fit(model.max_context_tokens)
            prompts = PromptMaker(
                model.vocab_size, model.eos_token_ids, self._wishes.prefix_tokens, given.seed
            )
            server = await self._about_server(model.name)
            if changed:
                server["too_long"] = changed
            before = await scrape(given.metrics_url)
            driver = Driver(self._caller(client), prompts, self._pace())
            own = OwnLoad()
            started_at = datetime.now(UTC).isoformat(timespec="seconds")
            interrupted = await self._drive(driver, own, sessions)
            # At once: what comes from here on is not the load's.
            result = results.result_of(
                driver, options=bench_flags.plain(given), targets=self._targets, server=server,
                own=own, machine=fingerprint(), fleet=self._fleet, started_at=started_at,
                interrupted=interrupted,
            )  # fmt: skip
            if given.metrics_url:
                result["server"].update(await self._agreement(before, driver))
        return result

    async def _agreement(self, before: Counter[str], driver: Driver) -> dict[str, Any]:
        """Minutes of load are not thrown away because a server no longer says what it counted."""
        try:
            after = await scrape(self._arguments.metrics_url)
        except ValueError as error:
            return {"agreement_problem": str(error)}
        return {"agreement": agreement(before, after, driver.samples)}

    def _fit(self, limit: int) -> tuple[list[Session] | Iterator[Session], int]:
        if not isinstance(self._sessions, list):
            return self._sessions, 0
        given = self._arguments
        kept, changed = self._sessions, 0
        if limit:
            kept, changed = fitted(kept, limit, self._wishes.prefix_tokens, given.too_long)
        if given.warmup >= len(kept):
            raise ValueError(f"warmup leaves out all of the {len(kept)} sessions")
        return kept, changed

    async def _about_server(self, model: str) -> dict[str, Any]:
        given = self._arguments
        connection = connection_of(given)
        if given.admin_address:
            settings = {**connection_settings(given), "address": given.admin_address}
            connection = Connection(**settings)
        return {"model": model, **await describe(connection)}

    def _pace(self) -> Pace:
        given = self._arguments
        return Pace(
            is_open=self._wishes.is_open,
            concurrency=given.concurrency or bench_flags.DEFAULT_CONCURRENCY,
            max_in_flight=given.max_in_flight,
            seconds=given.duration,
            think_seconds=given.think,
            warmup=given.warmup,
        )

    def _caller(self, client: AsyncClient) -> Callable[[Prompt, int], Messages]:
        given = self._arguments

        def call(prompt: Prompt, output_tokens: int) -> Messages:
            sampling = Sampling(
                temperature=given.temperature, max_tokens=output_tokens,
                ignore_eos=not given.stop_at_eos, seed=given.seed,
            )  # fmt: skip
            return client.stream(
                prompt, model=given.model, sampling=sampling, scheduling=self._scheduling,
                deadline_seconds=given.timeout, token_ids_only=given.token_ids_only,
            )  # fmt: skip

        return call

    async def _drive(
        self, driver: Driver, own: OwnLoad, sessions: Sequence[Session] | Iterator[Session]
    ) -> bool:
        """True when Ctrl-C or SIGTERM ended it; what has come by then counts."""
        total = None
        if isinstance(sessions, list):
            total = sum(len(session.turns) for session in sessions)
        beside = [asyncio.create_task(own.watch())]
        if not self._arguments.quiet:
            beside.append(asyncio.create_task(show(driver, own, total)))
        work = asyncio.create_task(driver.run(sessions))
        loop, interrupted = asyncio.get_running_loop(), False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            work.cancel()

        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, interrupt)
        try:
            await work
        except asyncio.CancelledError:
            if not interrupted:
                raise
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
            for task in beside:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        return interrupted
