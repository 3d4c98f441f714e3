"""Log-probabilities of tokens from hidden states: whole logits in float32 blocks, or TRL's tiles of them.

    python benchmarks/log_probs.py    # width and vocabulary of SmolLM2-135M
    python benchmarks/log_probs.py --tokens 8192 --dtype bfloat16
    python benchmarks/log_probs.py --draw    # chart and table of the result file

`functional.token_log_probs` reads logits. `trl.kernels.chunked_logprob.ChunkedLogProbFunction` holds tiles of them and
multiplies by the unembedding again in the backward pass. The product with the unembedding is timed on both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common.equality import relative, require_equal
from common.memory import now
from common.report import BLUE, Run, figure, finish_ratios, markdown, times_faster
from common.results import header, interleave, ratios, spread, write_run
from common.script import command_line, device_name, measure_or_draw, start
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from instructgpt_hf.functional import log_probs_and_entropy, token_log_probs

OURS, TRL = "this package", "TRL"
_CHUNK = _CHUNKED_LOGPROB_CHUNK_SIZE
_COLUMNS = ("dtype, tokens", "pass", "TRL", "this package", "how many times faster")
_PASSES = {"forward": "without gradient", "backward": "with gradient"}


def _ours(hidden: Tensor, weight: Tensor, ids: Tensor, with_entropy: bool) -> Tensor:
    logits = (hidden @ weight.T)[None]
    if with_entropy:
        return log_probs_and_entropy(logits, ids[None])[0][0]
    return token_log_probs(logits, ids[None])[0]


def _trls(hidden: Tensor, weight: Tensor, ids: Tensor, with_entropy: bool) -> Tensor:
    outputs = ("entropy",) if with_entropy else ()
    return ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, _CHUNK, None, 1.0, outputs)[0]


def measure(options: argparse.Namespace, path: Path) -> None:
    """Compare, then time in turns: scoring without gradient, training with entropy."""
    device, dtype = torch.device(device_name()), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.width, generator=generator).to(device, dtype)
    weight = (0.05 * torch.randn(options.vocabulary, options.width, generator=generator)).to(device, dtype)
    ids = torch.randint(options.vocabulary, (options.tokens,), generator=generator).to(device)
    upstream = torch.randn(options.tokens, generator=generator).to(device)

    def step(function: Callable[..., Tensor], backward: bool) -> list[Tensor]:
        inputs = [item.detach().requires_grad_(backward) for item in (hidden, weight)]
        with torch.set_grad_enabled(backward):
            logps = function(*inputs, ids, backward)
        return [logps.detach(), *(torch.autograd.grad(logps, inputs, upstream) if backward else ())]

    run = {**header(), "dtype": options.dtype, "tokens": options.tokens}
    run |= {"width": options.width, "vocabulary": options.vocabulary}
    for name in _PASSES:
        functions = {key: (lambda item=item, name=name: step(item, name == "backward")) for key, item in _sides()}
        found = {key: function() for key, function in functions.items()}
        differences = {
            kind: relative([first], [second])
            for kind, first, second in zip(("log-probs", "hidden", "weight"), found[OURS], found[TRL], strict=False)
        }
        require_equal(differences, 1e-4 if dtype == torch.float32 else 2e-2)
        del found

        def seconds(function: Callable[[], object]) -> Callable[[], float]:
            def once() -> float:
                begin = now(device.type == "cuda")
                function()
                return now(device.type == "cuda") - begin

            return once

        times = interleave({key: seconds(function) for key, function in functions.items()}, options.rounds)
        run[name] = {
            "differences": differences,
            "seconds": {key: spread(values) for key, values in times.items()},
            "faster": ratios(times[TRL], times[OURS]),
        }
    write_run(path, run, same=("dtype", "tokens", "width", "vocabulary"))
    print(table([run]))


def _sides() -> list[tuple[str, Callable[..., Tensor]]]:
    return [(TRL, _trls), (OURS, _ours)]


def _cases(runs: list[Run]) -> list[tuple[Run, str]]:
    return [(run, name) for run in runs for name in _PASSES]


def draw(runs: list[Run], chart: Path) -> None:
    """How many times faster, case by case."""
    cases = _cases(runs)
    labels = [f"{run['dtype']}, {run['tokens']} tokens,\n{_PASSES[name]}" for run, name in cases]
    with figure(chart, 6.4, 1.0 + 0.5 * len(cases)) as made:
        axes = made.subplots()
        for place, (run, name) in enumerate(cases):
            times_faster(axes, run[name]["faster"], place, BLUE, 5)
        finish_ratios(axes, labels, "TRL's time / this package's", 1.2)


def table(runs: list[Run]) -> str:
    """The table of the documentation."""
    rows = []
    for run, name in _cases(runs):
        part, seconds = run[name], run[name]["seconds"]
        rows.append(
            [
                f"{run['dtype']}, {run['tokens']}",
                _PASSES[name],
                *(f"{seconds[side]['min']:.2f} s" for side in (TRL, OURS)),
                f"{part['faster']['min']:.1f}",
            ]
        )
    return markdown(_COLUMNS, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "log_probs_<device>")
    parser.add_argument("--tokens", type=int, default=1024, help="completion tokens of a pass")
    parser.add_argument("--width", type=int, default=576, help="of the hidden states")
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or draw."""
    measure_or_draw(parse(arguments), f"log_probs_{device_name()}", measure, draw, table)


if __name__ == "__main__":
    start(main)
