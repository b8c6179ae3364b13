"""The sections of a run's configuration: keys, types, defaults, and what each key means.

Defaults live here only. Checks of one section are here; checks that span sections are in `run_config`.
Keys of the design that no code serves yet are left out, so that an unknown key is refused rather than ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from sfedlora.errors import ConfigError

__all__ = [
    "Count",
    "DataSection",
    "EvaluationSection",
    "FlowerSection",
    "LocalSection",
    "LoraSection",
    "MethodSection",
    "ModelSection",
    "PartitionSection",
    "PrivacySection",
    "RoundsSection",
    "Section",
    "Text",
]

DEFAULT_METHOD = "fedsa"
LARGEST = 1e30
"""Numbers above it leave float32, in which adapters are computed, within a product or two."""
LARGEST_COUNT = 1_000_000
"""Of anything that is counted: rounds, steps, examples, tokens, ranks. More is a slip of the pen, and would be found
out by filling the memory."""


def _storable(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"holds a NUL or invalid Unicode, got {text[:120]!a}; expected plain text")
    return text


def _known_method(name: str) -> str:
    if name == DEFAULT_METHOD:  # validated when this module is imported, which must not take seconds
        return name
    from sfedlora.methods import find_method  # torch: only when a configuration is checked

    try:
        find_method(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return name


Text = Annotated[str, AfterValidator(_storable)]
"""Text that can be a path and can be written to a file."""
Count = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=LARGEST, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=LARGEST, allow_inf_nan=False)]


def _number_or_list(value: Any) -> Any:
    if isinstance(value, int) or (isinstance(value, tuple | list) and value):
        return value
    shown = list(value) if isinstance(value, tuple) else value
    raise ValueError(f"expected an integer or a list of integers such as [4, 8, 8], got {str(shown)[:120]!r}")


Ranks = Annotated[
    Annotated[Count, Tag("one")] | Annotated[tuple[Count, ...], Field(min_length=1), Tag("many")],
    Discriminator(lambda value: "many" if isinstance(value, tuple | list) else "one"),
    BeforeValidator(_number_or_list),
]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A frozen section in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return values


class ModelSection(Section):
    """The frozen base model."""

    source: Text = Field(min_length=1)
    """Hugging Face hub id, local directory, GGUF file, or `package:NAME/path` (a file in an installed package)."""
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    """What the model is fine-tuned for."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights. auto: the checkpoint's own where the device computes it natively, else
    float32. Adapters are always float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Storage of the frozen linear weights through bitsandbytes, where it runs: 8bit, or 4bit (NF4). Adapters load on
    the unquantised base too, with slightly other logits."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 matrix products (`torch.set_float32_matmul_precision`). high: TF32 on NVIDIA GPUs. medium: bfloat16
    products, also on CPUs that have them. Anything but highest changes results in the third digit or so."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the transformer layers with torch.compile: faster steps after first ones that take minutes; needs a C++
    compiler (on GPUs Triton) and lora.dropout: 0. Results differ in rounding from those without, and equal bits need
    the same compiler."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compile and (self.gradient_checkpointing or self.quantization != "none"):
            raise ValueError("compile goes with neither gradient_checkpointing nor quantization; leave one of them out")
        return self


class DataSection(Section):
    """Examples, how they become token ids, and how each client's share is split."""

    source: Text = Field(min_length=1)
    """JSONL, JSON, CSV, TSV, Parquet or chatterbot YAML file, data set directory or hub id, or `package:NAME/path`."""
    subset: Text | None = None
    """Configuration name of a hub data set (`mnli` of `glue`)."""
    hub_split: Text = "train"
    """Which split of a hub data set holds the examples that are dealt to clients."""
    columns: dict[Text, Text | None] = Field(default_factory=dict)
    """Which columns hold what: `prompt` and `response` (causal-lm), `text`, `text_pair` and `label` (classification).
    A role left out is read from the column of its own name; `prompt: null` trains on `response` alone."""
    labels: tuple[Text | int, ...] | None = None
    """Label values in the order of their ids. null: the sorted distinct values of the label column."""
    template: Literal["plain", "alpaca", "chat"] = "plain"
    """How prompt and response become one text. chat: the tokenizer's own chat template."""
    loss_on: Literal["response", "all"] = "response"
    """Which tokens enter the loss."""
    max_length: Count = 256
    """Longest example in tokens. A longer one loses the start of its prompt first, then the end of its response."""
    split: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.8, 0.1, 0.1)
    """Train, validation and test fractions of every client's own examples."""
    group: Text | None = None
    """Column whose equal values stay together on one client and in one split (conversation, document)."""
    validation: Text | None = None
    """A further file evaluated as it is with every evaluated client, beside the clients' own validation splits."""
    test: Text | None = None
    """Like `validation`, for the first and the final evaluation."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = sum(self.split)
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"split must add up to 1, got {list(self.split)} = {total:g}")
        known = ("prompt", "response", "text", "text_pair", "label")
        for role in self.columns:
            if role not in known:
                raise ValueError(f"columns: unknown role {role!r}; expected some of {', '.join(known)}")
        return self


class PartitionSection(Section):
    """How the examples are dealt to clients."""

    scheme: Literal["iid", "dirichlet", "column", "shards", "quantity"] = "iid"
    """iid: equal random shares. dirichlet: label shares of each client drawn from Dirichlet(concentration). column: one
    client per value of `column`. shards: two label-sorted shards a client. quantity: random shares of unequal size."""
    num_clients: Count | None = None
    """Number of clients N. Required, except for `column`, where a number keeps that many largest values."""
    concentration: PositiveFloat | None = None
    """Dirichlet concentration for `dirichlet` and `quantity` (0.5 if not given); smaller is more uneven."""
    column: Text | None = None
    """The column that `column` deals by; for `dirichlet` and `shards` the one that replaces the label."""
    min_examples: Count = 10
    """Fewest examples a client may have."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scheme == "column" and self.column is None:
            raise ValueError("scheme 'column' needs partition.column")
        if self.scheme != "column" and self.num_clients is None:
            raise ValueError(f"scheme {self.scheme!r} needs partition.num_clients")
        if self.concentration is not None and self.scheme not in ("dirichlet", "quantity"):
            raise ValueError(f"scheme {self.scheme!r} does not use concentration; leave it out or null")
        if self.column is not None and self.scheme in ("iid", "quantity"):
            raise ValueError(f"scheme {self.scheme!r} does not use column; leave it out or null")
        return self


class LoraSection(Section):
    """The adapters."""

    rank: Ranks = 8
    """Rank r of every adapter, or a list of ranks (`rank_assignment`)."""
    rank_assignment: Literal["listed", "drawn"] = "listed"
    """What a list of ranks means. listed: one rank per client, in the order of client ids (numbers count as numbers).
    drawn: each client draws one of them by the seed, all equally likely (a rank that is listed twice is twice as
    likely)."""
    alpha: PositiveFloat = 16.0
    """alpha of the scaling rule."""
    scaling: Literal["lora", "rslora", "sfed"] = "sfed"
    """gamma. lora: alpha / r. rslora: alpha / sqrt(r). sfed: alpha * sqrt(N / r)."""
    num_clients: Literal["effective", "total"] | Annotated[float, Field(ge=1.0, le=LARGEST, allow_inf_nan=False)] = (
        "effective"
    )
    """N of the sfed rule. effective: 1 / sum w^2 of the average that formed A. total: the number of clients (the
    paper's letter). A number fixes it."""
    init: Literal["auto", "independent", "local", "shared", "reinit"] = "auto"
    """independent: N seeded draws of A, averaged before round 1. local: each client's own draw in round 1. shared: one
    draw. reinit: averaged draws times sqrt(N_eff), once. auto: independent for sfed, else shared."""
    target_modules: Text | tuple[Text, ...] = "default"
    """`default` (PEFT's table for the architecture), `all-linear`, a regular expression, or a list of name endings."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input while training."""


class MethodSection(Section):
    """The federated method."""

    name: Annotated[Text, AfterValidator(_known_method)] = DEFAULT_METHOD
    """fedsa, fedit, ffa, rolora, flora, fedex, flexlora, hetlora, fair, local, centralized, or `module:Class` for a
    method of your own, imported from what is installed or on PYTHONPATH."""
    head: Literal["auto", "personal", "shared"] = "auto"
    """Where a classification head lives. auto: personal for fedsa and local, shared for the others."""


class RoundsSection(Section):
    """The communication rounds."""

    num_rounds: Count = 10
    """Number of rounds."""
    cohort_size: Count | None = None
    """Clients that train in a round, sampled without replacement. null: all of them."""
    weighting: Literal["examples", "uniform"] = "examples"
    """Weight of a client in every average: its number of training examples, or the same for all."""
    server_optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    """none: the server takes the method's result as it is. The others step along its change of the shared factors:
    fedavgm with momentum, fedadam and fedyogi with a step size per entry (Reddi et al. 2021)."""
    server_learning_rate: Literal["auto"] | PositiveFloat = "auto"
    """Learning rate of the server optimizer. auto: 1 for fedavgm, 0.01 for fedadam and fedyogi, whose step moves an
    entry by up to this much. Not used by none."""
    server_momentum: Fraction = 0.9
    """Momentum (fedavgm), decay of the first moment (fedadam, fedyogi)."""
    server_beta2: Fraction = 0.99
    """Decay of the second moment of fedadam and fedyogi."""
    server_tau: Annotated[float, Field(ge=1e-15, le=LARGEST, allow_inf_nan=False)] = 1e-3
    """Added to the root of the second moment of fedadam and fedyogi; its square is where that moment starts."""
    proximal_mu: NonNegativeFloat = 0.0
    """FedProx: mu of the term mu / 2 ||theta - theta_start||^2 in every client's loss, over the trained factors that
    are shared (none for local). Recorded losses and gradient norms leave it out."""


class LocalSection(Section):
    """Local training of one client in one round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: torch's AdamW with its default betas. sgd: without momentum."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    learning_rate_a_ratio: NonNegativeFloat = 1.0
    """Learning rate of A divided by that of B. 1 / N_eff is the flat rule under SGD; 0 freezes A."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled (adamw) or L2 (sgd) weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the rounds after warmup: constant, or down towards 0 after the last round."""
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds over which the learning rate rises linearly to its peak."""
    batch_size: Count = 8
    """Examples in one forward pass."""
    accumulation: Count = 1
    """Forward passes per optimizer step; the loss is the mean over all their labelled tokens or examples."""
    local_steps: Count | None = 10
    """Optimizer steps per round. Give this or local_epochs."""
    local_epochs: Count | None = None
    """Passes over the client's training examples per round. Giving it replaces local_steps."""
    max_grad_norm: PositiveFloat | None = None
    """Clip the gradient of all trained factors together to this L2 norm. null: no clipping."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether a client's optimizer moments start from zero in every round."""

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_steps(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("local_epochs") is not None and "local_steps" not in values:
            return {**values, "local_steps": None}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("give exactly one of local_steps and local_epochs, and leave the other out or null")
        if self.local_steps is not None and self.local_steps * self.accumulation > LARGEST_COUNT:
            raise ValueError(
                f"local_steps {self.local_steps} times accumulation {self.accumulation} is more than {LARGEST_COUNT} "
                "forward passes a round; lower one of them"
            )
        return self


class PrivacySection(Section):
    """Differential privacy of what clients share, by client; docs/privacy.md says what it protects."""

    mode: Literal["none", "central", "local"] = "none"
    """central: the server clips every client's change of the shared factors and adds noise to their mean. local: every
    client clips its change and adds noise before it sends. Both need `rounds.weighting: uniform`."""
    clip_norm: PositiveFloat | None = None
    """Largest L2 norm of a client's change in a round, over all tensors that it sends. Required with a mode."""
    noise_multiplier: PositiveFloat | None = None
    """Standard deviation of the noise divided by `clip_norm`: of the sum of the clipped changes (central), or of each
    client's own (local). Required with a mode."""
    example_clip_norm: PositiveFloat | None = None
    """Privacy of single examples at the client, with or without a mode: largest L2 norm of the gradient of one example,
    over all factors that are trained. One forward pass an example. null: none."""
    example_noise_multiplier: PositiveFloat | None = None
    """Standard deviation of the noise on the sum of a batch's gradients, divided by `example_clip_norm`."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    """delta of the stated (epsilon, delta). Well below one over the number of clients."""
    noise: Literal["secret", "seeded"] = "secret"
    """secret: drawn from a key of the operating system's randomness, kept among the checkpoints, so two runs differ.
    seeded: from `seed`, so that runs repeat; whoever knows the seed can take the noise off."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, value in (("clip_norm", self.clip_norm), ("noise_multiplier", self.noise_multiplier)):
            if self.mode == "none" and value is not None:
                raise ValueError(f"{key}: {value:g} is not used by mode: none; leave it out, or use central or local")
            if self.mode != "none" and value is None:
                raise ValueError(f"mode: {self.mode} needs privacy.{key}")
        if (self.example_clip_norm is None) != (self.example_noise_multiplier is None):
            raise ValueError("give both of example_clip_norm and example_noise_multiplier, or neither")
        return self


class EvaluationSection(Section):
    """When and on whom the model is evaluated."""

    every: Count = 1
    """Evaluate after every so many rounds; the last round is always evaluated."""
    clients: Literal["auto", "all", "cohort"] | Count = "auto"
    """all clients, the round's cohort, or a fixed seeded sample of so many. auto: all, above 100 a sample of 100."""
    batch_size: Count = 32
    """Examples in one evaluation forward pass."""
    max_batch_tokens: Count = 4096
    """Tokens, padding included, in one evaluation forward pass."""


class FlowerSection(Section):
    """A federation across sites with Flower; a run on this machine uses none of it."""

    federation_id: Annotated[Text, Field(min_length=1, max_length=100)] | None = None
    """Names the federation: a site keeps its B and its head under it, so that a restarted node and a resumed server
    find them. `sfedlora flower init` writes a new one; two federations on the same sites need two."""
    sites: Annotated[tuple[Annotated[Text, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """Client ids of the sites that the federation begins with. null: the first `partition.num_clients` that report."""
    min_replies: Count = 1
    """Usable replies that a round needs; with fewer the run stops and can be resumed. Also the number of sites that
    must have reported when the time to join is over."""
    round_deadline_seconds: PositiveFloat = 3600.0
    """Time that the sites have to answer in a round, loading the base model included. Later answers are excluded."""
    join_deadline_seconds: PositiveFloat = 600.0
    """Time that the expected sites have to report before round 1 begins without the others."""
    metrics: Literal["per-client", "aggregate", "none"] = "aggregate"
    """What becomes of the losses and gradient norms that sites measure. per-client: sent and recorded for each site.
    aggregate: sent, and only means over sites are recorded. none: not sent; a site sends its number of examples only.
    """
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of factors on their way. bfloat16 halves the traffic and rounds every factor on each way."""
    secure_sum: bool = False
    """Sites send their changes under masks that cancel in the sum, so that the server learns the sum alone. Needs
    `sites`, at least three in a round, `min_replies` of all of them, and keys at the sites; see docs/privacy.md."""
    secure_limit: PositiveFloat | None = None
    """Largest absolute value of an entry of a site's change in a round, times its weight; a site with a larger one
    refuses, which ends the round. The sum of m sites is exact to about m^2 secure_limit / 2^32. Required with
    `secure_sum`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.secure_sum:
            if self.secure_limit is not None:
                raise ValueError(f"secure_limit: {self.secure_limit:g} is not used without secure_sum; leave it out")
            return self
        if self.secure_limit is None:
            raise ValueError(
                "secure_sum: true needs flower.secure_limit, the largest absolute value of an entry of a change"
            )
        if self.wire_dtype != "float32":
            raise ValueError(f"secure_sum: true sends whole numbers; use wire_dtype: float32, got {self.wire_dtype}")
        if self.sites is None:
            raise ValueError("secure_sum: true needs flower.sites, the client ids whose public keys the sites exchange")
        return self
