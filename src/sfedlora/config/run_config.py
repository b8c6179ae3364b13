"""One run's whole configuration: loading, overriding, checking, writing.

`RunConfig.load("run.yaml", ["lora.rank=128"])` is the only way in from files and the command line. What can be
checked without the model and the data is checked here; `resolve` in `experiment` replaces every `auto`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from sfedlora.config.presets import PRESETS
from sfedlora.config.sections import (
    Count,
    DataSection,
    EvaluationSection,
    FlowerSection,
    LocalSection,
    LoraSection,
    MethodSection,
    ModelSection,
    PartitionSection,
    PrivacySection,
    RoundsSection,
    Section,
    Text,
)
from sfedlora.config.yaml_file import Document, dump_yaml, parse_scalar, read_yaml
from sfedlora.errors import ConfigError

if TYPE_CHECKING:
    from sfedlora.methods import Method

__all__ = ["RunConfig", "apply_overrides", "with_overrides"]

OVERRIDE_LINE = 0
"""Stands for the command line among the lines of a file."""
LONGEST_VALUE = 120
"""Characters of a wrong value that a message repeats."""
LARGEST_STACK = 1024
MOST_WORKERS = 1024
LARGEST_THREADS = 1024
"""More cannot be started on most systems, which ends the process."""
FEWEST_SECURE_SITES = 3
"""That of `privacy.secure_sum`, whose library a configuration does not need."""


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", device):
        raise ValueError(f"{_shown(device)} cannot be used; expected auto, cpu, mps, cuda or cuda:N")
    return device


class RunConfig(Section):
    """Everything that defines a run."""

    preset: Text | None = None
    """Optional row of the methods table that fills in method and scaling; explicit keys win over it."""
    model: ModelSection
    data: DataSection
    partition: PartitionSection
    lora: LoraSection = LoraSection()
    method: MethodSection = MethodSection()
    rounds: RoundsSection = RoundsSection()
    local: LocalSection = LocalSection()
    evaluation: EvaluationSection = EvaluationSection()
    privacy: PrivacySection = PrivacySection()
    flower: FlowerSection = FlowerSection()
    robust: Literal["none", "median", "trimmed_mean", "krum"] = "none"
    """What takes the place of the mean against hostile clients. median, trimmed_mean: of every entry, for methods that
    share one factor in a round. krum: the one update that lies nearest to the others, for all methods. Every client
    counts the same."""
    robust_attackers: Count | None = None
    """Hostile clients in a round that trimmed_mean and krum withstand; a cohort needs more than twice as many."""
    robust_taken: Count | None = None
    """Updates that krum takes, the nearest ones, into the method's own server step (Multi-Krum). null: one. More keep
    more of what clients learn; the proof of Krum allows fewer than the cohort less 2 f + 2."""
    runner: Literal["auto", "serial", "batched"] = "auto"
    """How a cohort is executed on this machine. serial: one client after the other. batched: several clients in one
    forward pass over the shared base. auto: batched where `clients_per_batch` comes out above 1."""
    clients_per_batch: Literal["auto"] | Annotated[int, Field(ge=1, le=LARGEST_STACK)] = "auto"
    """Most clients in one forward pass of the batched runner; those whose batches have other shapes may get passes of
    their own. auto: as many as keep a forward pass under a token cap of the device, by batch size and median length; 1
    where stacking does not pay. Halved for the rest of a run whenever memory does not hold as many."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_WORKERS)] = "auto"
    """Processes that train clients at the same time, each with a base model of its own and, on GPUs, a GPU of its own;
    more than one need Ray. auto: one for each visible CUDA device. Not more than a cohort has clients."""
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """auto (CUDA, then MPS, then CPU), cpu, mps, cuda or cuda:N."""
    threads: Annotated[Count, Field(le=LARGEST_THREADS)] | None = None
    """CPU threads of each process. null: torch's own choice, divided by `workers` and then recorded. Equal bits need
    equal threads."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Root of every random draw."""
    output: Text = Field(default="runs/run", min_length=1)
    """Run directory. It must be absent or empty."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and apply `key=value` overrides.

        Raises:
            ConfigError: one message that names the key, its line, what was given and what was expected.
        """
        document = with_overrides(read_yaml(Path(path)), overrides)
        return cls.from_mapping(document.values, origin=document, name=str(path))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, origin: Document | None = None, name: str = "config") -> Self:
        """Check a plain nested mapping; `origin` gives the lines for messages.

        Raises:
            ConfigError: as `load`.
        """
        try:
            return cls.model_validate(_with_preset(values, _line_of("preset", origin, name)))
        except ValidationError as error:
            raise ConfigError(_explain(error, origin, name)) from None

    def dump(self) -> str:
        """This configuration as YAML that `load` reads back equal."""
        return dump_yaml(self.model_dump(mode="json"))

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """A checked copy with dotted keys replaced."""
        nested = self.model_dump(mode="json")
        for dotted, value in values.items():
            _set(nested, dotted, value)
        return self.from_mapping(nested)

    @model_validator(mode="after")
    def _check(self) -> Self:
        clients, cohort = self.partition.num_clients, self.rounds.cohort_size
        if clients is not None and cohort is not None and cohort > clients:
            raise ValueError(
                f"rounds.cohort_size is {cohort} but there are only {clients} clients (partition.num_clients)"
            )
        from sfedlora.methods import make_method  # torch: only when a configuration is checked
        from sfedlora.types import Part

        try:
            method = make_method(self.method.name, self.method.head)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.lora.init == "reinit" and not method.traits.averages_a:
            raise ValueError(
                f"lora.init: reinit rescales the averaged A, which method {self.method.name!r} does not form; "
                "use independent or shared"
            )
        if self.lora.init == "local" and Part.A not in method.trained_parts(1):
            raise ValueError(
                f"lora.init: local starts every client from its own A, but method {self.method.name!r} freezes one A "
                "that all share; use independent or shared"
            )
        if self.model.compile and self.lora.dropout:
            raise ValueError(
                "model.compile goes with lora.dropout: 0 only: torch.compile leaves out layers whose masks are drawn "
                "from each client's seed; leave one of them out"
            )
        self._check_ranks(method)
        self._check_protection(method)
        if self.local.optimizer_state == "keep" and (method.traits.restarts or method.traits.keeps_products):
            raise ValueError(
                f"local.optimizer_state: keep carries moments to the next round, whose factors method "
                f"{self.method.name!r} chooses anew; use reset"
            )
        if self.method.name == "flexlora":
            self._check_flexlora()
        if self.rounds.server_optimizer != "none" and not method.traits.server_optimizers:
            raise ValueError(
                f"rounds.server_optimizer: {self.rounds.server_optimizer} steps along the change of the factors from "
                f"round to round, which method {self.method.name!r} does not have; use none"
            )
        if self.runner == "serial" and self.clients_per_batch not in ("auto", 1):
            raise ValueError(
                f"clients_per_batch: {self.clients_per_batch} clients in one forward pass need runner: batched, got "
                "runner: serial"
            )
        if self.runner == "batched" and self.clients_per_batch == 1:
            raise ValueError("clients_per_batch: 1 is what runner: serial does; give at least 2, auto, or that runner")
        if self.local.warmup_rounds > self.rounds.num_rounds:
            raise ValueError(
                f"local.warmup_rounds is {self.local.warmup_rounds} but there are {self.rounds.num_rounds} rounds"
            )
        return self

    def _check_protection(self, method: Method) -> None:
        """Privacy and robust rule fit the method and the rounds."""
        from sfedlora.federation.combinations import (  # torch: only when a configuration is checked
            Protection,
            why_refused,
        )

        rank, init = self.lora.rank, self.lora.init
        protection = Protection(
            method=method,
            robust=self.robust,
            privacy=self.privacy.mode,
            weighting=self.rounds.weighting,
            init=init,
            several_ranks=not isinstance(rank, int) and len(set(rank)) > 1,
            attackers=self.robust_attackers,
            taken=self.robust_taken,
            cohort_size=self.rounds.cohort_size or self.partition.num_clients,
            secure_sum=self.flower.secure_sum,
        )
        refusal = why_refused(protection)
        if refusal is not None:
            raise ValueError(refusal)
        if self.flower.secure_sum:
            self._check_secure_sum()
        if self.privacy.example_clip_norm is not None:
            self._check_example_privacy(several_ranks=protection.several_ranks)

    def _check_example_privacy(self, *, several_ranks: bool) -> None:
        """Examples are clipped one by one."""
        if self.local.accumulation != 1:
            raise ValueError(
                f"privacy.example_clip_norm: needs local.accumulation: 1, so that an example is in a step once, got "
                f"{self.local.accumulation}; raise local.batch_size instead, examples are computed one by one anyway"
            )
        if self.runner == "batched" or self.clients_per_batch not in ("auto", 1):
            raise ValueError("privacy.example_clip_norm: trains one client at a time; use runner: serial or auto")
        if several_ranks:
            raise ValueError("privacy.example_clip_norm: needs one rank for all clients; give one number in lora.rank")

    def _check_secure_sum(self) -> None:
        """A secure sum has enough sites in a round, and waits for all of them."""
        num_sites, needed = len({*(self.flower.sites or ())}), self.flower.min_replies
        cohort_size = min(self.rounds.cohort_size or num_sites, num_sites)
        if cohort_size < FEWEST_SECURE_SITES:
            raise ValueError(
                f"flower.secure_sum: true needs at least {FEWEST_SECURE_SITES} sites in a round, or the sum tells one "
                f"site's change to another; got {cohort_size} (flower.sites, rounds.cohort_size)"
            )
        if needed != cohort_size:
            raise ValueError(
                f"flower.min_replies: {needed}, but a secure sum opens only when all {cohort_size} sites of a round "
                f"have answered; give {cohort_size}"
            )

    def _check_ranks(self, method: Method) -> None:
        """A list of ranks fits the clients and the method."""
        rank, assignment, clients = self.lora.rank, self.lora.rank_assignment, self.partition.num_clients
        if isinstance(rank, int):
            if assignment == "drawn":
                raise ValueError(f"lora.rank_assignment: drawn needs a list in lora.rank to draw from, got {rank}")
            return
        if len(set(rank)) > 1 and not method.traits.heterogeneous_ranks:
            raise ValueError(
                f"lora.rank: method {self.method.name!r} needs one rank for all clients, got {_shown(list(rank))}; "
                f"give one number, or use one of {', '.join(_methods_with_own_ranks())}"
            )
        if assignment == "listed" and clients is not None and len(rank) != clients:
            raise ValueError(
                f"lora.rank: {len(rank)} ranks for {clients} clients (partition.num_clients); give one for each, or "
                "lora.rank_assignment: drawn"
            )

    def _check_flexlora(self) -> None:
        """Refuse what assumes that A keeps the variance of its draws."""
        if self.lora.scaling == "sfed" and isinstance(self.lora.num_clients, str):
            raise ValueError(
                f"lora.scaling: sfed with num_clients: {self.lora.num_clients} undoes the averaging of A, but method "
                "'flexlora' gives A orthonormal rows in every round; use lora or rslora, or fix the number in "
                "lora.num_clients"
            )


def _methods_with_own_ranks() -> list[str]:
    from sfedlora.methods import METHODS, make_method

    return [name for name in METHODS if make_method(name).traits.heterogeneous_ranks]


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a nested mapping with `key=value` overrides applied in order.

    Raises:
        ConfigError: an override without `=`, or one that goes through a value that is no section.
    """
    result = _copy(values)
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted.strip():
            raise ConfigError(f"override {override!r}: expected key=value, for example lora.rank=128")
        _set(result, dotted.strip(), parse_scalar(text))
    return result


def with_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """A document with `apply_overrides` applied; messages about those keys then name no line of the file."""
    values = apply_overrides(document.values, overrides)
    given = [override.partition("=")[0].strip() for override in overrides]
    lines = {
        key: line for key, line in document.lines.items() if not any(key == g or key.startswith(f"{g}.") for g in given)
    }
    return Document(values, lines | dict.fromkeys(given, OVERRIDE_LINE))


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    here = values
    for section in sections:
        inner = here.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {dotted}: {section!r} is a value, not a section")
        here = inner
    here[last] = value


def _with_preset(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The values over those of their preset; `where` begins the message about an unknown one."""
    preset = values.get("preset")
    if preset is None:
        return values
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(
            f"{where}preset: unknown preset {_shown(preset)};{_did_you_mean(str(preset), PRESETS)} choose one of "
            f"{', '.join(PRESETS)}"
        )
    merged = dict(values)
    for section, defaults in PRESETS[preset].items():
        given = merged.get(section) or {}
        if isinstance(given, Mapping):
            merged[section] = {**defaults, **given}
    return merged


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" did you mean {close[0]!r}?" if close else ""


def _explain(error: ValidationError, origin: Document | None, name: str) -> str:
    messages = [_explain_one(dict(detail), origin, name) for detail in error.errors(include_url=False)]
    return "\n".join(dict.fromkeys(messages))


def _explain_one(detail: Mapping[str, Any], origin: Document | None, name: str) -> str:
    path = _real_path(detail["loc"])
    dotted = ".".join(path)
    where = _line_of(dotted, origin, name)
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        return f"{where}unknown key {dotted!r};{_did_you_mean(path[-1], known)} known keys here: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{where}{dotted} is required but was not given"
    if detail["type"] == "value_error":
        return f"{where}{dotted + ': ' if dotted else ''}{message}"
    return f"{where}{dotted}: {message[0].lower()}{message[1:]}, got {_shown(detail['input'])}"


def _real_path(loc: Sequence[str | int]) -> list[str]:
    """The keys of an error location, without the union branch names that pydantic appends."""
    path: list[str] = []
    model: type[BaseModel] | None = RunConfig
    for step in loc:
        if model is None:
            break
        path.append(str(step))
        field = model.model_fields.get(str(step))
        inner = field.annotation if field else None
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    return path


def _keys_at(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for step in path:
        inner = model.model_fields[step].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return list(model.model_fields)


def _line_of(dotted: str, origin: Document | None, name: str) -> str:
    if origin is None:
        return ""
    parents = [dotted.rsplit(".", cut)[0] for cut in range(dotted.count(".") + 1)]
    line = next((origin.lines[key] for key in parents if key in origin.lines), None)
    if line == OVERRIDE_LINE:
        return "override "
    return f"{name}, line {line}: " if line else f"{name}: "


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
