"""What the page of one run says, section by section. It may still be going on, or have failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sfedlora.config.flatten import flatten
from sfedlora.report.blocks import Bars, Block, Grid, Note, Section, Table
from sfedlora.report.load import (
    RunRecord,
    initial_clients,
    load_environment,
    load_split_sizes,
    lookup,
    number,
)
from sfedlora.report.panels import METRICS, Panel, gain_panel, gradient_panel, loss_panels
from sfedlora.report.series import line_of_points

__all__ = [
    "client_changes",
    "exclusion_rows",
    "facts_of",
    "phase_totals",
    "run_sections",
    "settings_section",
    "status_of",
]

PHASES = {"train_seconds": "training", "aggregate_seconds": "server step", "eval_seconds": "evaluation"}
TRAFFIC = {"bytes_up": "clients to server", "bytes_down": "server to clients"}
MEGABYTE = 1e6
SHORT = {
    "eval_loss": "loss",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
}


def run_sections(run: RunRecord, answers: Sequence[Mapping[str, str]] = ()) -> list[Section]:
    """Everything that is known about a run.

    Args:
        run: the run, with or without finished rounds.
        answers: prompt, reference, before and after of sample generations, if there are some.

    Raises:
        StorageError: a damaged file.
    """
    sections = [
        Section("Metrics", _metric_blocks(run)),
        Section("Gradients and gain", _gradient_blocks(run)),
        Section("Clients", _client_blocks(run)),
        Section("Time and traffic", _cost_blocks(run)),
        Section("Excluded clients", _exclusion_blocks(run)),
    ]
    if answers:
        columns = ("client", "prompt", "reference", "before", "after")
        rows = [[answer[column] for column in columns] for answer in answers]
        note = "Greedy continuations of test prompts by the untouched model and with the client's own adapter."
        sections.append(Section("Sample generations", [Note(note), Table(columns, rows)]))
    return [*sections, settings_section(run, "Settings and environment")]


def status_of(run: RunRecord) -> str:
    """Finished, or how far it has come and when that was."""
    planned = run.settings.get("rounds.num_rounds")
    done = len(run.rounds)
    if run.summary:
        return f"finished: {done} rounds"
    of = f" of {planned}" if planned is not None else ""
    mark = run.path / ("metrics.jsonl" if run.rounds else "config.yaml")
    when = datetime.fromtimestamp(mark.stat().st_mtime, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    return f"not finished: {done}{of} rounds, last written {when}"


def facts_of(run: RunRecord) -> list[tuple[str, str]]:
    """The few settings and results that a reader looks for first."""
    settings, environment = run.settings, load_environment(run.path)
    scaling = lookup(environment, "scaling") or {}
    gamma = scaling.get("gamma")
    facts = [
        ("model", settings.get("model.source")),
        ("method", settings.get("method.name")),
        ("scaling, init", f"{settings.get('lora.scaling')}, {settings.get('lora.init')}"),
        ("rank, alpha", f"{settings.get('lora.rank')}, {_shown(settings.get('lora.alpha'))}"),
        ("gamma", "per client" if isinstance(gamma, Mapping) else _shown(gamma)),
        ("clients N", settings.get("partition.num_clients")),
        (
            "effective clients: by weights, measured",
            f"{_shown(scaling.get('effective_clients'))}, {_shown(scaling.get('measured_effective_clients'))}",
        ),
        ("device", environment.get("device")),
    ]
    for key, name in SHORT.items():
        start = number(lookup(run.summary, "initial", "test", "weighted", key))
        end = number(lookup(run.summary, "last", "test", "weighted", key))
        if start is not None and end is not None:
            facts.append((f"test {name}: start, last round", f"{_shown(start)}, {_shown(end)}"))
    return [(name, str(value)) for name, value in facts if value is not None]


def settings_section(run: RunRecord, title: str) -> Section:
    """All settings and the environment of a run, closed."""
    environment = flatten(load_environment(run.path))
    settings = Table(("setting", "value"), [(key, _text(value)) for key, value in run.settings.items()], "config.yaml")
    recorded = Table(("what", "value"), [(key, _text(value)) for key, value in environment.items()], "environment.json")
    return Section(title, [settings, recorded] if environment else [settings], is_open=False)


def client_changes(run: RunRecord) -> list[tuple[str, float, float]]:
    """(client, initial, last) loss on the client's own validation split, where both are known, largest gain first."""
    start, end = initial_clients(run, "validation"), _last_clients(run, evaluated=True)
    pairs = [
        (client, number(lookup(start, client, "eval_loss")), number(metrics.get("eval_loss")))
        for client, metrics in end.items()
    ]
    known = [(client, first, last) for client, first, last in pairs if first is not None and last is not None]
    return sorted(known, key=lambda item: item[2] - item[1])


def exclusion_rows(run: RunRecord) -> list[tuple[int, str, str]]:
    """(round, client, reason)."""
    return [
        (int(record["round_num"]), str(client), _text(reason))
        for record in run.rounds
        for client, reason in (lookup(record, "excluded") or {}).items()
    ]


def phase_totals(run: RunRecord) -> dict[str, float]:
    """Seconds and bytes of all rounds together, by their names in metrics.jsonl."""
    return {key: sum(number(record.get(key)) or 0.0 for record in run.rounds) for key in (*PHASES, *TRAFFIC)}


def _metric_blocks(run: RunRecord) -> list[Block]:
    if not run.rounds:
        return [Note("No round has finished yet.")]
    panels = loss_panels(run)
    training = line_of_points("training, on the clients' batches", "", [_series(run, "train_loss")])
    if panels and training.points and panels[0].y_label == METRICS["eval_loss"]:
        first = panels[0]
        validation = line_of_points("validation, mean over clients", "", [[p[:2] for p in first.lines[0].points]])
        panels[0] = Panel("loss", first.x_label, "loss (nats)", [validation, training])
    elif training.points:
        panels = [Panel("loss", "round", "loss (nats)", [training]), *panels]
    blocks: list[Block] = [Grid(panels)] if panels else []
    if run.summary:
        blocks.append(_summary_table(run.summary))
    return [*blocks, _rounds_table(run)]


def _summary_table(summary: Mapping[str, Any]) -> Table:
    names = [name for name in SHORT if lookup(summary, "last", "validation", "weighted", name) is not None]
    columns = [
        "state",
        "round",
        "split",
        *(f"{SHORT[n]}, {mean}" for n in names for mean in ("weighted", "unweighted")),
    ]
    rows = [
        [
            when,
            lookup(summary, when, "round_num") or 0,
            split,
            *(lookup(summary, when, split, mean, name) for name in names for mean in ("weighted", "unweighted")),
        ]
        for when in ("initial", "last", "best")
        for split in ("validation", "test")
    ]
    caption = "Means over clients, weighted by their examples or all the same; best is chosen on validation."
    return Table(columns, rows, caption)


def _rounds_table(run: RunRecord) -> Table:
    wanted = ("train_loss", *SHORT, "grad_norm_b", "grad_norm_a", "gain", "effective_cohort_size", "tokens")
    present = [key for key in wanted if any(number(record.get(key)) is not None for record in run.rounds)]
    rows = [
        [
            record["round_num"],
            *(record.get(key) for key in present),
            len(record.get("cohort") or ()),
            len(record.get("excluded") or ()),
        ]
        for record in run.rounds
    ]
    return Table(["round", *(key.replace("_", " ") for key in present), "cohort", "excluded"], rows, "Every round")


def _gradient_blocks(run: RunRecord) -> list[Block]:
    panels = [panel for panel in (gradient_panel(run), gain_panel(run)) if panel.lines]
    return [Grid(panels)] if panels else [Note("No gradient norms were recorded.")]


def _client_blocks(run: RunRecord) -> list[Block]:
    sizes, changes = load_split_sizes(run.path), client_changes(run)
    charts: list[Panel | Bars] = []
    if changes:
        values = [last - first for _, first, last in changes]
        names = [client for client, _, _ in changes]
        title = "Who gains: change of validation loss since the initial model"
        charts.append(Bars(title, "change (nats), below 0 is better", names, {"change": values}, True, True))
    if sizes:
        ordered = sorted(sizes, key=lambda client: -sum(sizes[client]))
        splits = ("train", "validation", "test")
        parts = {split: [float(sizes[client][at]) for client in ordered] for at, split in enumerate(splits)}
        charts.append(Bars("Examples of each client", "examples", ordered, parts, sideways=True))
    blocks: list[Block] = [Grid(charts)] if charts else []
    if changes:
        worse = sum(last > first for _, first, last in changes)
        blocks.insert(
            0,
            Note(
                f"{len(changes) - worse} of {len(changes)} clients have a lower or equal validation loss "
                f"than with the initial model, {worse} a higher one."
            ),
        )
    table = _client_table(run, sizes)
    return [*blocks, table] if table.rows else blocks or [Note("Nothing is known about single clients yet.")]


def _client_table(run: RunRecord, sizes: Mapping[str, tuple[int, int, int]]) -> Table:
    trained, evaluated = _last_clients(run, evaluated=False), _last_clients(run, evaluated=True)
    start = initial_clients(run, "validation")
    ids = sorted({*sizes, *trained, *evaluated})
    names = [name for name in SHORT if any(name in metrics for metrics in evaluated.values())]
    columns = ["client", "train", "validation", "test", "last train loss"]
    columns += [f"{SHORT[name]} {when}" for name in names for when in ("initial", "last")]
    columns += ["loss change", "|grad B|", "times excluded"]
    excluded = [client for _, client, _ in exclusion_rows(run)]
    rows = []
    for client in ids:
        first, last = start.get(client, {}), evaluated.get(client, {})
        begin, end = number(lookup(first, "eval_loss")), number(lookup(last, "eval_loss"))
        rows.append(
            [
                client,
                *sizes.get(client, (None, None, None)),
                lookup(trained, client, "train_loss"),
                *(value for name in names for value in (first.get(name), last.get(name))),
                end - begin if begin is not None and end is not None else None,
                lookup(trained, client, "grad_norm_b"),
                excluded.count(client),
            ]
        )
    caption = "Each client on its own data with what it would serve; metrics are on its validation split."
    return Table(columns, rows, caption)


def _cost_blocks(run: RunRecord) -> list[Block]:
    if not run.rounds:
        return [Note("No round has finished yet.")]
    rounds = [str(record["round_num"]) for record in run.rounds]
    seconds = {name: [number(record.get(key)) for record in run.rounds] for key, name in PHASES.items()}
    traffic = {
        name: [None if (value := number(record.get(key))) is None else value / MEGABYTE for record in run.rounds]
        for key, name in TRAFFIC.items()
    }
    totals = phase_totals(run)
    charts = [
        Bars("Seconds of each round", "seconds", rounds, seconds),
        Bars("Traffic of each round", "MB", rounds, traffic),
    ]
    rows = [
        *((name, "s", totals[key], totals[key] / len(rounds)) for key, name in PHASES.items()),
        *((name, "MB", totals[key] / MEGABYTE, totals[key] / MEGABYTE / len(rounds)) for key, name in TRAFFIC.items()),
    ]
    return [Grid(charts), Table(("phase", "unit", "all rounds", "mean of a round"), rows)]


def _exclusion_blocks(run: RunRecord) -> list[Block]:
    rows = exclusion_rows(run)
    if not rows:
        return [Note("No client was excluded.")]
    return [Table(("round", "client", "reason"), rows)]


def _last_clients(run: RunRecord, *, evaluated: bool) -> dict[str, Mapping[str, Any]]:
    """Client id -> its entry of the last round in which it was evaluated, or trained."""
    key = "eval_loss" if evaluated else "train_loss"
    return {client: entry for client, entry in _client_entries(run) if key in entry}


def _client_entries(run: RunRecord) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for record in run.rounds:
        for client, entry in (lookup(record, "clients") or {}).items():
            if isinstance(entry, Mapping):
                yield str(client), entry


def _series(run: RunRecord, key: str) -> list[tuple[float, float]]:
    values = [(float(record["round_num"]), number(record.get(key))) for record in run.rounds]
    return [(at, value) for at, value in values if value is not None]


def _shown(value: Any) -> str:
    known = number(value)
    return "unknown" if known is None else f"{known:.5g}"


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
