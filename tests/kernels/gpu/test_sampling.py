"""The device's sampler against gpu_service.model.sampling, token by token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gpu_service.engine.messages import SamplingSpec
from gpu_service.model import sampling as oracle
from gpu_service.model.sampling import SamplingRow
from kernels.gpu import draw_kernels, sampling_kernels
from kernels.gpu.sampling import Sampler
from kernels.gpu.sampling_inputs import NEVER, History, RowWish, SamplingInputs
from kernels.gpu.tensors import INTERPRET
from tests.support.mutants import mutated

DEVICE = "cpu" if INTERPRET else "cuda"
EOS = 3


def row(
    *, prompt: Sequence[int] = (), output: Sequence[int] = (), choice: int = 0, **spec: Any
) -> SamplingRow:
    return SamplingRow(SamplingSpec(max_tokens=99, **spec), prompt, output, choice)


def wish(of: SamplingRow, slot: int) -> RowWish:
    spec = of.spec
    edits = dict(spec.logit_bias)
    if len(of.output_token_ids) < spec.min_tokens:
        edits.update(dict.fromkeys((EOS, *spec.stop_token_ids), NEVER))
    penalties = (spec.repetition_penalty, spec.frequency_penalty, spec.presence_penalty)
    return RowWish(
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        min_p=spec.min_p,
        seed=spec.seed + of.choice_index,
        position=len(of.output_token_ids),
        edits=edits,
        history=slot if penalties != (1.0, 0.0, 0.0) else -1,
        repetition=penalties[0],
        frequency=penalties[1],
        presence=penalties[2],
        logprobs=-1 if spec.logprobs is None else spec.logprobs,
    )


def logits_for(
    rows: int, vocab: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)


def sampler_for(rows: int, vocab: int) -> Sampler:
    """Tiles and chunks so small that every path is taken."""
    return Sampler(rows, vocab, DEVICE, tile=128, chunk=64, room=100)


def drawn(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    count, vocab = logits.shape
    inputs = SamplingInputs(count + 1, 64, DEVICE)
    history = History(count, vocab, DEVICE)
    for slot, each in enumerate(rows):
        history.start(slot, each.prompt_token_ids, each.output_token_ids)
    inputs.send([wish(each, slot) for slot, each in enumerate(rows)])
    out = torch.full((count,), -7, device=DEVICE)
    given = logits.to(DEVICE)
    sampler_for(count + 2, vocab).sample(given, inputs, out, history)
    torch.testing.assert_close(given.cpu(), logits, rtol=0, atol=0, equal_nan=True)
    return out.tolist()


def expected(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    found = oracle.Sampler([EOS]).sample(logits.float(), rows)
    return torch.where(found.finite, found.token_ids, -1).tolist()


FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "cold": {"temperature": 0.01},
    "top-k": {"top_k": 7},
    "top-k of most": {"top_k": 410},
    "top-k of all": {"top_k": 420},
    "top-p": {"top_p": 0.8},
    "tiny top-p": {"top_p": 1e-6},
    "wide top-p": {"top_p": 0.99999, "temperature": 3.0},
    "top-p of nothing": {"top_p": 0.0},
    "min-p": {"min_p": 0.1},
    "only the best": {"min_p": 1.0},
    "all": {"top_k": 60, "top_p": 0.9, "min_p": 0.01, "temperature": 1.5},
    "top-k, then top-p": {"top_k": 300, "top_p": 0.7, "temperature": 2.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FILTERS)
def test_draws_equal_the_oracle(name: str, dtype: torch.dtype) -> None:
    """In bf16 many logits are equal."""
    spec = {"temperature": 0.8, **FILTERS[name]}
    rows = [row(seed=2**60 + i, output=[1] * i, **spec) for i in range(5)]
    logits = logits_for(5, 420, dtype=dtype)
    assert drawn(logits, rows) == expected(logits, rows)


def test_rows_of_all_kinds_in_one_batch() -> None:
    rows = [
        row(seed=i, choice=i, prompt=[i % 5], output=[2] * (i % 3), **spec)
        for i, spec in enumerate((*FILTERS.values(), {"temperature": 0.0}))
    ]
    logits = logits_for(len(rows), 130)
    assert drawn(logits, rows) == expected(logits, rows)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_penalties_bias_and_muted_tokens(temperature: float) -> None:
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "top_k": 3},
        {"frequency_penalty": 0.9},
        {"presence_penalty": 1.5, "frequency_penalty": -0.2},
        {"logit_bias": {4: 6.5, 17: -2.0, 299: 7.0}},
        {"min_tokens": 9, "stop_token_ids": (5, 6), "logit_bias": {EOS: 50.0, 11: 3.0}},
        {"repetition_penalty": 1.3, "logit_bias": {1: 4.0, 2: 4.0}, "min_tokens": 2},
    ]
    rows = [
        row(
            prompt=[1, 2, i, 299], output=[2, 2, 7, 298][: i % 5], seed=i,
            temperature=temperature, **options[i % len(options)],
        )
        for i in range(28)
    ]  # fmt: skip
    logits = logits_for(len(rows), 300, scale=3.0)
    assert drawn(logits, rows) == expected(logits, rows)


def test_equal_logits_and_rows_without_a_choice() -> None:
    logits = torch.zeros(6, 300)
    logits[1, 260] = float("nan")
    logits[2, 5] = float("inf")
    logits[3] = float("-inf")
    logits[4, :299] = float("-inf")
    rows = [
        row(temperature=t, seed=s, top_k=4, top_p=0.5)
        for s, t in enumerate((1.0, 1.0, 0.0, 1.0, 1.0, 0.0))
    ]
    found = drawn(logits, rows)
    assert found == expected(logits, rows)
    assert found[1:] == [-1, -1, -1, 299, 0]
    out = torch.empty(6, dtype=torch.int64, device=DEVICE)
    sampler_for(6, 300).greedy(logits.to(DEVICE), out)
    assert out.tolist() == [0, -1, -1, -1, 299, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_greedy_takes_the_first_of_the_largest(dtype: torch.dtype) -> None:
    logits = logits_for(5, 1000, dtype=dtype).to(DEVICE)
    logits[1, [900, 300, 301]] = 50.0
    out = torch.empty(5, dtype=torch.int64, device=DEVICE)
    sampler_for(5, 1000).greedy(logits, out)
    assert out.tolist() == [300 if i == 1 else int(logits[i].argmax()) for i in range(5)]


def test_history_counts_what_is_drawn_once() -> None:
    """Several tokens one after the other, each sweep repeated with other logits before the real
    one, in a slot that another request has had."""
    vocab, output = 50, [8, 9]
    spec: dict[str, Any] = {"frequency_penalty": 2.0, "repetition_penalty": 1.2, "temperature": 0.0}
    inputs, history = SamplingInputs(1, 1, DEVICE), History(2, vocab, DEVICE)
    sampler, out = sampler_for(1, vocab), torch.empty(1, dtype=torch.int64, device=DEVICE)
    history.start(1, list(range(40)), [3] * 5)
    history.start(1, [4, 4, 5], output)
    for step in range(12):
        now = row(prompt=[4, 4, 5], output=list(output), **spec)
        inputs.send([wish(now, 1)])
        sampler.sample(logits_for(1, vocab, 99 - step).to(DEVICE), inputs, out, history)
        logits = logits_for(1, vocab, step % 2)
        sampler.sample(logits.to(DEVICE), inputs, out, history)
        assert out.tolist() == expected(logits, [now])
        output.append(int(out[0]))
    assert len(set(output)) > 4
    assert history.table[0].count_nonzero() == 0


@pytest.mark.parametrize("in_prompt", [0, 1])
def test_counts_stay_within_16_bits(in_prompt: int) -> None:
    """A token said more often than that: neither its count nor the prompt's mark runs over."""
    inputs, history = SamplingInputs(1, 1, DEVICE), History(1, 10, DEVICE)
    history.start(0, [4] * in_prompt, [4] * 16_381)
    sampler, out = sampler_for(1, 10), torch.empty(1, dtype=torch.int64, device=DEVICE)
    logits = torch.tensor([[0.0] * 4 + [3e4] + [0.0] * 5], device=DEVICE)
    for position in range(16_381, 16_385):
        inputs.send([RowWish(history=0, position=position, presence=1.0)])
        sampler.sample(logits, inputs, out, history)
    assert out.tolist() == [4]
    assert history.table[0].tolist() == [0] * 4 + [2 * 16_382 + in_prompt] + [0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logprobs(dtype: torch.dtype) -> None:
    tops = [None, 0, 5, 20, 1]
    rows = [row(seed=i, logprobs=top) for i, top in enumerate(tops)]
    logits = logits_for(5, 1000, dtype=dtype)
    theirs = oracle.Sampler([EOS]).sample(logits.float(), rows)
    inputs, out = SamplingInputs(5, 1, DEVICE), torch.empty(5, dtype=torch.int64, device=DEVICE)
    inputs.send([wish(each, -1) for each in rows])
    sampler = sampler_for(5, 1000)
    sampler.sample(logits.to(DEVICE), inputs, out)
    found = sampler.logprobs(logits.to(DEVICE), out, inputs.tops)
    for i, want in enumerate(theirs.logprobs):
        if want is None:
            continue
        assert out[i] == want.token_id
        assert found.logprob[i].item() == pytest.approx(want.logprob, abs=2e-6)
        assert found.rank[i] == want.rank
        values = [value for _, value in want.top]
        assert found.top_logprobs[i, : len(values)].tolist() == pytest.approx(values, abs=2e-6)
        ids = found.top_ids[i, : len(values)].long().cpu()
        # Of equals torch may list any.
        assert len(set(ids.tolist())) == len(values)
        assert torch.equal(logits[i, ids], logits[i, [token for token, _ in want.top]])


def test_some_rows_of_many() -> None:
    """Wishes for a few rows in any order; tokens of the others stay."""
    places, vocab = [5, 1, 8], 300
    rows = [row(seed=i, logprobs=i, temperature=0.5 * i, output=[4] * i) for i in range(3)]
    logits = logits_for(9, vocab)
    theirs = oracle.Sampler([EOS]).sample(logits[places], rows)
    inputs, out = SamplingInputs(4, 1, DEVICE), torch.full((9,), -7, device=DEVICE)
    sampler = Sampler(9, vocab, DEVICE, draws=4, tile=128, chunk=64, room=100)
    inputs.send([wish(each, -1) for each in rows], places)
    sampler.sample(logits.to(DEVICE), inputs, out)
    assert out[places].tolist() == theirs.token_ids.tolist()
    assert sorted(set(range(9)) - set(places)) == (out == -7).nonzero()[:, 0].tolist()
    found = sampler.logprobs(logits.to(DEVICE), out, inputs.tops[:3], inputs.places[:3])
    wanted = [entry for entry in theirs.logprobs if entry is not None]
    assert found.rank.tolist() == [entry.rank for entry in wanted]
    assert found.logprob.tolist() == pytest.approx([w.logprob for w in wanted], abs=2e-6)
    assert found.top_ids[2, :2].tolist() == [token for token, _ in wanted[2].top]


def test_a_failed_row_has_no_logprobs() -> None:
    sampler, inputs = sampler_for(1, 30), SamplingInputs(1, 1, DEVICE)
    inputs.send([RowWish(logprobs=2)])
    tokens = torch.tensor([-1], device=DEVICE)
    sampler._logprobs.rank.fill_(-7)
    assert sampler.logprobs(logits_for(1, 30).to(DEVICE), tokens, inputs.tops).rank.tolist() == [-7]


@pytest.mark.skipif(INTERPRET, reason="the interpreter captures no graphs")
def test_a_captured_graph_takes_new_wishes() -> None:
    rows, vocab = 6, 1000
    inputs, history = SamplingInputs(rows, 8, DEVICE), History(rows, vocab, DEVICE)
    sampler, logits = sampler_for(rows, vocab), torch.zeros(rows, vocab, device=DEVICE)
    out = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    inputs.send([RowWish()] * rows)
    sampler.sample(logits, inputs, out, history)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.sample(logits, inputs, out, history)
    for seed in range(3):
        values = logits_for(rows, vocab, seed)
        wanted = [row(seed=seed + i, top_p=0.3 * i, temperature=seed) for i in range(rows)]
        inputs.send([wish(each, -1) for each in wanted])
        logits.copy_(values)
        graph.replay()
        assert out.tolist() == expected(values, wanted)


def test_wrong_arguments_are_sentences() -> None:
    inputs = SamplingInputs(2, 3, DEVICE)
    with pytest.raises(ValueError, match="3 rows are more than the 2"):
        inputs.send([RowWish()] * 3)
    with pytest.raises(ValueError, match="4 edited logits"):
        inputs.send([RowWish(edits={1: 1.0, 2: 1.0}), RowWish(edits={1: NEVER, 2: 0.0})])
    out = torch.empty(3, dtype=torch.int64, device=DEVICE)
    inputs.send([RowWish()] * 2, [0, 3])
    with pytest.raises(ValueError, match="reach to row 3, logits have 3"):
        Sampler(3, 8, DEVICE).sample(torch.zeros(3, 8, device=DEVICE), inputs, out)
    with pytest.raises(ValueError, match="2 rows are more than the 1"):
        Sampler(3, 8, DEVICE, draws=1).sample(torch.zeros(3, 8, device=DEVICE), inputs, out)
    with pytest.raises(ValueError, match="3 rows are more than the 2"):
        Sampler(2, 8, DEVICE).greedy(torch.zeros(3, 8, device=DEVICE), out)
    with pytest.raises(ValueError, match="tokens must be"):
        Sampler(3, 8, DEVICE).greedy(torch.zeros(3, 8, device=DEVICE), out.int())


MUTANTS = {
    "position ignored": ("(position + 1)", "(position * 0 + 1)"),
    "seed ignored": ("_mix(seed.to", "_mix(0 * seed.to"),
    "other bits": (">> 16", ">> 17"),
    "top-k one too many": ("top_k.to(tl.float64)", "(top_k + 1).to(tl.float64)"),
    "temperature ignored": ("tl.div_rn(x - best, temperature)", "x - best"),
    "min-p ignored": ("tl.maximum(floor, min_floor)", "floor"),
    "top-p ignored": ("top_p * total", "total"),
    "gathered under wrong names": ("ids_ptr + place, at, mask", "ids_ptr + place, at ^ 1, mask"),
    "gathered in another place": ("TILES_PAD) < tile, counts", "TILES_PAD) > tile, counts"),
    "a threshold too high": (
        "tl.min(tl.where(enough, j, 7), 0)",
        "tl.min(tl.where(enough, j, 7), 0) // 2",
    ),
    "the first chunk only": ("running = after", "running = running"),
    "prompt not penalised": ("(seen > 0) | (count > 0)", "count > 0"),
    "output not counted": ("(seen >> 1)", "(seen & 1)"),
    "edits ignored": ("x = tl.where(at == token, edited, x)", "x = x"),
    "penalty the wrong way": ("tl.where(x > 0, tl.div_rn", "tl.where(x < 0, tl.div_rn"),
}


@pytest.mark.parametrize("name", ["", *MUTANTS])
def test_mutants_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name:
        old, new = MUTANTS[name]
        module = next(m for m in (sampling_kernels, draw_kernels) if old in inspect.getsource(m))
        changed = mutated(module, old, new, tmp_path)
        for kernel in ("_best_kernel", "_weigh_kernel", "_gather_kernel", "_draw_kernel"):
            if hasattr(module, kernel):
                monkeypatch.setattr(f"kernels.gpu.sampling.{kernel}", getattr(changed, kernel))
    filters = list(FILTERS.values())
    rows = [
        row(
            prompt=range(i % 9, 180, 2), output=[7, i % 5, 7][: i % 4], seed=i,
            repetition_penalty=3.0 if i % 3 == 0 else 1.0, frequency_penalty=i % 2,
            logit_bias={i * 7 % 180: 9.0} if i % 5 == 0 else {},
            **{"temperature": 0.8, **({"top_k": 1} if i % 11 == 0 else filters[i % len(filters)])},
        )
        for i in range(39)
    ]  # fmt: skip
    logits = logits_for(len(rows), 180)
    # In parts: most mutants show in the first rows.
    parts = (slice(begin, begin + 13) for begin in range(0, len(rows), 13))
    same = all(
        drawn(logits[part], rows[part]) == expected(logits[part], rows[part]) for part in parts
    )
    assert same == (name == "")
