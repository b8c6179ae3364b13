"""Rows, token ids and the clients' shares, as the configuration asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sfedlora.config import RunConfig
from sfedlora.data.encode import encode_causal, encode_classification
from sfedlora.data.encoded import EncodedData
from sfedlora.data.examples import Examples, load_examples
from sfedlora.data.labels import number_labels
from sfedlora.data.partition import ClientSplit, assign_clients, safe_directory_name, split_client
from sfedlora.errors import ConfigError
from sfedlora.lora.base_model import BaseModel
from sfedlora.lora.limits import input_limits
from sfedlora.seeds import derive_seed

__all__ = ["deal_examples", "encode_examples", "find_label_names", "load_external", "load_source", "partition_record"]

SPLIT_PREFIX = "split:"


def load_source(config: RunConfig, source: str) -> Examples:
    """The rows of a source; `split:NAME` is another split of the run's own hub data set."""
    if source.startswith(SPLIT_PREFIX):
        return load_examples(config.data.source, subset=config.data.subset, split=source.removeprefix(SPLIT_PREFIX))
    subset = config.data.subset if source == config.data.source else None
    return load_examples(source, subset=subset, split=config.data.hub_split)


def encode_examples(config: RunConfig, examples: Examples, base: BaseModel, label_names: Sequence[str]) -> EncodedData:
    """Token ids of the rows, by the run's task, columns and template.

    Raises:
        DataError: a column or a row cannot be used.
        ConfigError: rows are longer than the model can read, or their ids are not the model's.
    """
    encoded = _encode(config, examples, base.tokenizer, label_names)
    limits = input_limits(base.model)
    longest = int(encoded.lengths.max())
    if limits.max_tokens is not None and longest > limits.max_tokens:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} lets an example of {longest} tokens through, but "
            f"{config.model.source} reads at most {limits.max_tokens}; lower data.max_length"
        )
    if int(encoded.tokens.max()) >= limits.num_embeddings:
        raise ConfigError(
            f"model.source: the tokenizer of {config.model.source} gives token id {int(encoded.tokens.max())}, but the "
            f"model has {limits.num_embeddings} embeddings; the tokenizer belongs to another model"
        )
    return encoded


def find_label_names(config: RunConfig, examples: Examples) -> tuple[str, ...]:
    """Names of the classes in the order of their ids; empty for causal-lm."""
    if config.model.task == "causal-lm":
        return ()
    column = _required_role(config, "label")
    names = config.data.labels if config.data.labels is not None else examples.class_names.get(column)
    _, label_names = number_labels(examples.column(column), names, where=f"{examples.source}, column {column!r}")
    return label_names


def deal_examples(config: RunConfig, examples: Examples, data: EncodedData) -> dict[str, ClientSplit]:
    """Deal the examples to clients and split each client's share; in client-id order.

    Raises:
        ConfigError: the scheme needs a column that was not named.
        DataError: the rows cannot be dealt as asked.
    """
    section = config.partition
    values: Sequence[Any] | None = None
    if section.column is not None:
        values = examples.column(section.column)
    elif section.scheme in ("dirichlet", "shards"):
        if data.labels is None:
            raise ConfigError(
                f"partition.scheme: {section.scheme!r} deals by class; task {config.model.task} has no labels, "
                "so name a column in partition.column"
            )
        values = data.labels.tolist()
    groups = examples.column(config.data.group) if config.data.group is not None else None
    assigned = assign_clients(
        scheme=section.scheme,
        num_rows=len(data),
        num_clients=section.num_clients,
        labels_or_column=values,
        concentration=0.5 if section.concentration is None else section.concentration,
        min_examples=section.min_examples,
        seed=derive_seed(config.seed, "partition"),
        groups=groups,
    )
    return {
        client_id: split_client(
            assigned[client_id], fractions=config.data.split, client_id=client_id, seed=config.seed, groups=groups
        )
        for client_id in sorted(assigned)
    }


def load_external(config: RunConfig) -> dict[str, Examples]:
    """The rows of the further validation and test files, where there are some."""
    sources = {"validation": config.data.validation, "test": config.data.test}
    return {split: load_source(config, source) for split, source in sources.items() if source is not None}


def partition_record(examples: Examples, splits: Mapping[str, ClientSplit]) -> dict[str, Any]:
    """Content of partition.json: rows of the source, from 0 in file order; example i of the encoded data is row i."""
    clients = {
        client_id: {
            "dir": safe_directory_name(client_id),
            "train": list(split.train),
            "validation": list(split.validation),
            "test": list(split.test),
        }
        for client_id, split in splits.items()
    }
    return {"source_sha256": examples.sha256, "clients": clients}


def _encode(
    config: RunConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str]
) -> EncodedData:
    if config.model.task == "causal-lm":
        return encode_causal(
            examples,
            tokenizer,
            prompt=_role(config, "prompt"),
            response=_required_role(config, "response"),
            template=config.data.template,
            loss_on=config.data.loss_on,
            max_length=config.data.max_length,
        )
    encoded, _ = encode_classification(
        examples,
        tokenizer,
        text=_required_role(config, "text"),
        text_pair=_role(config, "text_pair"),
        label=_required_role(config, "label"),
        labels=label_names,
        max_length=config.data.max_length,
    )
    return encoded


def _role(config: RunConfig, role: str) -> str | None:
    """The column that plays a role: the configured one, else the column of the role's own name."""
    return config.data.columns.get(role, None if role == "text_pair" else role)


def _required_role(config: RunConfig, role: str) -> str:
    column = _role(config, role)
    if column is None:
        raise ConfigError(f"data.columns.{role}: null, but task {config.model.task} needs this column; name it")
    return column
