"""The figure of a probe: |grad B| against rank and clients, gain against rank, loss against learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sfedlora.probe.measure import Cell, Measurements
from sfedlora.report.panels import GAIN, GRADIENT, Panel
from sfedlora.report.plotting import draw_panels
from sfedlora.report.series import Line, line_of_points

__all__ = ["draw_probe"]

HIGHEST_SHOWN = 1.2
"""Times the initial loss: where a loss above it, or one that is not finite, is drawn."""


def draw_probe(measured: Measurements, path: Path) -> Path | None:
    """Write the figure.

    Raises:
        InputError: matplotlib is missing.
        StorageError: the file cannot be written.
    """
    cells = measured.cells
    largest = max(cell.size.num_clients for cell in cells)
    ranks = [cell.size.rank for cell in cells]
    middle = max(dict.fromkeys(ranks), key=ranks.count)
    at_rank, at_clients = f"r = {middle}", f"N = {largest}"

    def lines(key: str, value: Callable[[Cell], float]) -> list[Line]:
        kept = [c for c in cells if (c.size.num_clients == largest if key == "rank" else c.size.rank == middle)]
        names = dict.fromkeys((cell.rule, cell.init) for cell in kept)
        found = []
        for rule, init in names:
            own = [c for c in kept if (c.rule, c.init) == (rule, init) and value(c) > 0]
            points = [(float(c.size.rank if key == "rank" else c.size.num_clients), value(c)) for c in own]
            found.append(line_of_points(f"{rule}, {init}", "", [points]))
        return [line for line in found if len(line.points) > 1]

    rates = [
        line_of_points(f"N = {count}", "", [_losses(measured, count)])
        for count in sorted({step.size.num_clients for step in measured.ladders})
    ]
    rows = [
        [
            Panel(f"gradient of B in round 2, {at_clients}", "rank r", GRADIENT, lines("rank", _b), True, True),
            Panel(f"gradient of B in round 2, {at_rank}", "clients N", GRADIENT, lines("clients", _b), True, True),
        ],
        [
            Panel(f"gain in round 2, {at_clients}", "rank r", GAIN, lines("rank", _gain), True, True),
            Panel(
                f"sfed, r = {measured.ladders[0].size.rank}: two rounds" if measured.ladders else "",
                "learning rate",
                "loss on validation (nats)",
                [line for line in rates if line.points],
                log_x=True,
            ),
        ],
    ]
    return draw_panels(rows, "Probe", path)


def _b(cell: Cell) -> float:
    return cell.grad_norm_b


def _gain(cell: Cell) -> float:
    return cell.gain


def _losses(measured: Measurements, num_clients: int) -> list[tuple[float, float]]:
    """(rate, loss), what is higher or not finite at the highest loss that is shown."""
    top = HIGHEST_SHOWN * measured.initial_loss
    steps = [step for step in measured.ladders if step.size.num_clients == num_clients]
    return [(step.learning_rate, top if step.loss is None else min(step.loss, top)) for step in steps]
