"""The resident model: flat buffers that the model, its gradients and an optimizer share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sfedlora.errors import AdapterError, ConfigError, ModelError
from sfedlora.lora.base_delta import advance_deltas
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.lora.layer import LoraLinear, SeededDropout, seeded_dropout
from sfedlora.types import LoraSize, Part
from support.tiny_models import (
    VOCAB_SIZE,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
    tiny_opt,
    tiny_roberta_classifier,
)

IDS = torch.randint(3, VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1])


def llama(rank: int = 4, dropout: float = 0.0) -> ResidentModel:
    resident = adapt(tiny_llama(), target_modules="default", rank=rank, dropout=dropout)
    resident.scaling = 0.8
    return resident


def bert(dropout: float = 0.0) -> ResidentModel:
    return adapt(
        tiny_bert_classifier(), target_modules="default", rank=4, dropout=dropout, head_modules=["pooler", "classifier"]
    )


def random_factors(resident: ResidentModel, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * 0.2 for n, s in resident.layout.shapes(resident.rank).items()}


def loss_of(resident: ResidentModel) -> Any:  # a tensor; torch does not type its `backward`
    return resident.model(input_ids=IDS, labels=LABELS if resident.layout.head else IDS).loss


def test_an_untrained_adapter_changes_nothing() -> None:
    plain = tiny_llama()(input_ids=IDS).logits
    assert llama().model(input_ids=IDS).logits.equal(plain)


def test_layout_and_initial_values() -> None:
    resident = bert()
    model = tiny_bert_classifier()
    assert [target.path for target in resident.layout.targets] == [
        f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")
    ]
    assert resident.layout.head == {
        "bert.pooler.dense.weight": (24, 24),
        "bert.pooler.dense.bias": (24,),
        "classifier.weight": (3, 24),
        "classifier.bias": (3,),
    }
    assert resident.layout.head_modules == ("pooler", "classifier")
    assert resident.target_suffixes == ("query", "value")
    values = resident.read()
    assert list(values) == list(resident.layout.shapes(4))
    for name, value in values.items():
        expected = model.get_parameter(name.split(":")[1]) if name.startswith("head:") else torch.zeros(value.shape)
        assert value.equal(expected), name


def test_read_returns_what_load_was_given() -> None:
    resident = bert()
    factors = random_factors(resident)
    resident.load(factors)
    values = resident.read()
    assert all(values[name].equal(factors[name]) for name in factors)
    changed = {"b:bert.encoder.layer.1.attention.self.value": torch.ones(24, 4)}
    resident.load(changed)
    expected = factors | changed
    after = resident.read()
    assert all(after[name].equal(expected[name]) for name in expected)
    only_b = resident.read([Part.B])
    assert list(only_b) == [name for name in factors if name.startswith("b:")]


def test_what_read_returned_is_a_copy() -> None:
    resident = llama()
    resident.load(random_factors(resident))
    before = resident.read()
    kept = {name: value.clone() for name, value in before.items()}
    resident.load(random_factors(resident, seed=1))
    assert all(before[name].equal(kept[name]) for name in kept)
    before["a:model.layers.0.self_attn.q_proj"].fill_(7)
    assert not (resident.flat(Part.A) == 7).any()


def test_flat_buffers_are_the_parameters() -> None:
    resident = bert()
    factors = random_factors(resident)
    resident.load(factors)
    for part in Part:
        names = resident.layout.shapes(4, [part])
        assert resident.flat(part).equal(torch.cat([factors[name].flatten() for name in names]))
    resident.flat(Part.HEAD).fill_(0.5)
    assert (resident.model.classifier.weight == 0.5).all()
    resident.flat(Part.B).zero_()
    assert all((layer.b == 0).all() for layer in resident.model.modules() if isinstance(layer, LoraLinear))


def test_backward_adds_to_the_flat_gradients_in_place() -> None:
    resident = bert()
    resident.load(random_factors(resident))
    pointers = {part: resident.flat_grad(part).data_ptr() for part in Part}
    loss_of(resident).backward()
    once = {part: resident.flat_grad(part).clone() for part in Part}
    loss_of(resident).backward()
    for part in Part:
        assert once[part].abs().max() > 0
        torch.testing.assert_close(resident.flat_grad(part), 2 * once[part], rtol=0, atol=0)
        assert resident.flat_grad(part).data_ptr() == pointers[part]
    layers = [module for module in resident.model.modules() if isinstance(module, LoraLinear)]
    by_name = torch.cat([layer.a.grad.flatten() for layer in layers if layer.a.grad is not None])
    assert resident.flat_grad(Part.A).equal(2 * once[Part.A])
    assert by_name.equal(resident.flat_grad(Part.A))
    resident.zero_grad()
    assert all((resident.flat_grad(part) == 0).all() for part in Part)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_on_flat_tensors_equals_one_on_every_parameter(optimizer: type[torch.optim.Optimizer]) -> None:
    flat, single = bert(), bert()
    for resident in (flat, single):
        resident.load(random_factors(resident))
    on_flat = optimizer([flat.flat(part) for part in Part], lr=0.01)  # type: ignore[call-arg]
    on_single = optimizer([p for p in single.model.parameters() if p.requires_grad], lr=0.01)  # type: ignore[call-arg]
    for _ in range(3):
        for resident, opt in ((flat, on_flat), (single, on_single)):
            resident.zero_grad()
            loss_of(resident).backward()
            opt.step()
    moved = flat.read()
    expected = single.read()
    start = random_factors(flat)
    for name in moved:
        torch.testing.assert_close(moved[name], expected[name], rtol=1e-6, atol=1e-7)
        assert not moved[name].equal(start[name])


def test_only_the_trained_parts_get_gradients() -> None:
    resident = bert()
    resident.load(random_factors(resident))
    loss_of(resident).backward()
    resident.set_trained([Part.B])
    assert (resident.flat_grad(Part.A) == 0).all()
    assert (resident.flat_grad(Part.HEAD) == 0).all()
    resident.zero_grad()
    loss_of(resident).backward()
    assert resident.flat_grad(Part.B).abs().max() > 0
    assert (resident.flat_grad(Part.A) == 0).all()
    assert (resident.flat_grad(Part.HEAD) == 0).all()
    resident.set_trained([Part.A, Part.HEAD])
    resident.zero_grad()
    loss_of(resident).backward()
    assert (resident.flat_grad(Part.B) == 0).all()
    assert resident.flat_grad(Part.A).abs().max() > 0


def test_the_base_never_changes_or_learns() -> None:
    resident = bert(dropout=0.1)
    trained = {id(parameter) for parameter in resident.model.parameters() if parameter.requires_grad}
    assert len(trained) == len(resident.layout.shapes(4))
    assert not any(module.training for module in resident.model.modules())
    resident.dropout.seeds = (1,)
    loss_of(resident).backward()
    frozen = [parameter for parameter in resident.model.parameters() if id(parameter) not in trained]
    assert frozen
    assert all(parameter.grad is None for parameter in frozen)


def test_a_part_that_does_not_exist_is_empty() -> None:
    resident = llama()
    assert resident.flat(Part.HEAD).shape == (0,)
    assert resident.flat_grad(Part.HEAD).shape == (0,)
    assert resident.read([Part.HEAD]) == {}
    resident.set_trained([Part.A, Part.HEAD])


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (
            {"a:model.layers.9.self_attn.q_proj": torch.zeros(4, 24)},
            "a:model.layers.9.self_attn.q_proj: the adapted model",
        ),
        (
            {"a:model.layers.0.self_attn.q_proj": torch.zeros(5, 24)},
            r"q_proj: shape \(5, 24\); expected \(4, 24\) \(rank 4\)",
        ),
        ({"a:model.layers.0.self_attn.q_proj": torch.zeros(4, 24).long()}, "q_proj: dtype torch.int64"),
    ],
)
def test_factors_that_do_not_fit_are_refused_and_nothing_is_copied(factors: dict[str, Tensor], message: str) -> None:
    resident = llama()
    good = {"b:model.layers.0.self_attn.q_proj": torch.ones(24, 4)}
    with pytest.raises(AdapterError, match=message):
        resident.load(good | factors)
    assert (resident.flat(Part.B) == 0).all()


def test_other_float_dtypes_are_cast() -> None:
    resident = llama()
    name = "a:model.layers.0.self_attn.q_proj"
    resident.load({name: torch.full((4, 24), 1.5, dtype=torch.bfloat16)})
    assert resident.read([Part.A])[name].equal(torch.full((4, 24), 1.5))


def test_scaling_reaches_every_layer() -> None:
    resident = llama()
    resident.load(random_factors(resident))
    one = resident.model(input_ids=IDS).logits
    resident.scaling = 0.0
    assert resident.scaling == 0.0
    assert resident.model(input_ids=IDS).logits.equal(tiny_llama()(input_ids=IDS).logits)
    resident.scaling = 0.8
    assert resident.model(input_ids=IDS).logits.equal(one)


def test_resize_gives_new_buffers_and_keeps_the_rest() -> None:
    resident = bert()
    head = random_factors(resident)
    resident.load(head)
    resident.set_trained([Part.B])
    flat = resident.flat(Part.A)
    resident.resize(4)
    assert resident.flat(Part.A) is flat
    resident.resize(2)
    assert resident.rank == 2
    values = resident.read()
    assert {name: tuple(value.shape) for name, value in values.items()} == resident.layout.shapes(2)
    assert all((value == 0).all() for name, value in values.items() if not name.startswith("head:"))
    assert all(values[name].equal(head[name]) for name in values if name.startswith("head:"))
    resident.load(random_factors(resident))
    loss_of(resident).backward()
    assert resident.flat_grad(Part.B).abs().max() > 0
    assert (resident.flat_grad(Part.A) == 0).all()
    with pytest.raises(ConfigError, match="rank = 0"):
        resident.resize(0)


@pytest.mark.parametrize(("rank", "dropout", "message"), [(0, 0.0, "rank = 0"), (2, 1.0, "dropout = 1.0")])
def test_settings_outside_their_range_are_refused(rank: int, dropout: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(tiny_llama(), target_modules="default", rank=rank, dropout=dropout)


def test_a_rank_above_the_layer_warns_once_and_works() -> None:
    with pytest.warns(UserWarning, match=r"rank 40 is above .* = 12 of model.layers.0.self_attn.v_proj") as caught:
        resident = adapt(tiny_llama(), target_modules="default", rank=40)
    assert len(caught) == 1
    resident.load(random_factors(resident))
    loss_of(resident).backward()
    assert resident.flat_grad(Part.A).abs().max() > 0


def test_a_removed_gradient_buffer_is_reported() -> None:
    resident = llama()
    resident.flat(Part.A).grad = None
    with pytest.raises(ModelError, match="part 'a' was removed"):
        resident.flat_grad(Part.A)


def test_dropout_is_off_until_seeds_are_set_and_never_uses_the_global_generator() -> None:
    resident = bert(dropout=0.3)
    resident.load(random_factors(resident))
    quiet = resident.model(input_ids=IDS).logits
    state = torch.get_rng_state()
    assert resident.model(input_ids=IDS).logits.equal(quiet)
    resident.dropout.seeds = (5,)
    drawn = resident.model(input_ids=IDS).logits
    assert not drawn.equal(quiet)
    assert resident.model(input_ids=IDS).logits.equal(drawn)
    resident.dropout.seeds = (6,)
    assert not resident.model(input_ids=IDS).logits.equal(drawn)
    assert torch.get_rng_state().equal(state)
    resident.dropout.seeds = None
    assert resident.model(input_ids=IDS).logits.equal(quiet)


def test_head_dropout_acts_on_the_head_only() -> None:
    resident = bert(dropout=0.0)
    replaced = [path for path, module in resident.model.named_modules() if isinstance(module, SeededDropout)]
    assert replaced == ["dropout"]
    assert resident.model.dropout.p == pytest.approx(0.1)
    pooled = resident.model.bert(input_ids=IDS).pooler_output
    resident.dropout.seeds = (5,)
    expected = resident.model.classifier(seeded_dropout(pooled, 0.1, (5,), "dropout"))
    assert resident.model(input_ids=IDS).logits.equal(expected)
    roberta = adapt(tiny_roberta_classifier(), target_modules="default", rank=2, head_modules=["classifier"])
    assert [p for p, m in roberta.model.named_modules() if isinstance(m, SeededDropout)] == ["classifier.dropout"]
    headless = adapt(tiny_bert_classifier(), target_modules="default", rank=2)
    assert not any(isinstance(module, SeededDropout) for module in headless.model.modules())


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_opt])
def test_gradient_checkpointing_gives_the_same_gradients_and_recomputes(build: type) -> None:
    def gradients(*, checkpointing: bool) -> tuple[Tensor, Tensor, int]:
        resident = adapt(build(), target_modules="default", rank=4, dropout=0.2)
        resident.load(random_factors(resident))
        resident.dropout.seeds = (3,)
        if checkpointing:
            resident.enable_gradient_checkpointing()
            resident.enable_gradient_checkpointing()
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        first = next(module for module in resident.model.modules() if isinstance(module, LoraLinear))
        first.register_forward_hook(count)
        loss_of(resident).backward()
        with torch.no_grad():
            loss_of(resident)
        return resident.flat_grad(Part.A), resident.flat_grad(Part.B), calls

    plain, recomputed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert plain[2] == 2
    assert recomputed[2] == 3
    assert recomputed[0].equal(plain[0])
    assert recomputed[1].equal(plain[1])
    assert plain[0].abs().max() > 0


def test_models_without_such_layers_refuse_gradient_checkpointing() -> None:
    resident = llama()
    resident.model.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="no layers that support gradient checkpointing"):
        resident.enable_gradient_checkpointing()


def test_head_modules_inside_a_bfloat16_encoder_return_its_dtype() -> None:
    model = tiny_bert_classifier().to(torch.bfloat16)
    resident = adapt(model, target_modules="default", rank=4, head_modules=["pooler", "classifier"])
    output = resident.model.bert(input_ids=IDS)
    assert output.last_hidden_state.dtype == output.pooler_output.dtype == torch.bfloat16
    assert resident.model.bert.pooler.dense.weight.dtype == torch.float32


@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_roberta_classifier, tiny_llama_classifier])
def test_a_float32_head_on_a_bfloat16_encoder(build: type) -> None:
    heads = {tiny_bert_classifier: ["pooler", "classifier"], tiny_llama_classifier: ["score"]}.get(
        build, ["classifier"]
    )
    low = adapt(build().to(torch.bfloat16), target_modules="default", rank=4, head_modules=heads)
    high = adapt(build(), target_modules="default", rank=4, head_modules=heads)
    factors = random_factors(high)
    for resident in (low, high):
        resident.load(factors)
        resident.dropout.seeds = (4,)
        loss_of(resident).backward()
    assert low.model.dtype == torch.bfloat16
    assert low.model(input_ids=IDS).logits.dtype == torch.float32
    torch.testing.assert_close(low.model(input_ids=IDS).logits, high.model(input_ids=IDS).logits, rtol=0.05, atol=0.05)
    for part in Part:
        cosine = torch.cosine_similarity(low.flat_grad(part), high.flat_grad(part), dim=0)
        assert cosine > 0.99


def test_generation_works_with_the_cache_off_in_training() -> None:
    resident = llama()
    assert resident.model(input_ids=IDS).past_key_values is None
    tokens = resident.model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] <= IDS.shape[1] + 4


# Base deltas

MODULES = {"model.layers.0.self_attn.q_proj": (24, 24), "model.layers.1.self_attn.v_proj": (12, 24)}
"""Two of the adapted modules, (out, in)."""


def products(rank: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (torch.randn(out, rank, generator=generator) * 0.1, torch.randn(rank, features, generator=generator))
        for path, (out, features) in MODULES.items()
    }


def logits_with(factors: Mapping[str, Tensor], scaling: float, *rounds: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Logits of the plain model with everything added to its weights."""
    model = tiny_llama()
    with torch.no_grad():
        for path in (name.split(":")[1] for name in factors if name.startswith("a:")):
            model.get_parameter(f"{path}.weight").add_(factors[f"b:{path}"] @ factors[f"a:{path}"], alpha=scaling)
        for left, right, path in ((*pair, path) for added in rounds for path, pair in added.items()):
            model.get_parameter(f"{path}.weight").add_(left @ right)
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("rank", [3, 15], ids=["factors", "matrices"])
def test_a_served_model_is_the_plain_one_with_everything_added_to_its_weights(rank: int) -> None:
    resident = llama()
    earlier, last = products(rank), products(1, seed=1)
    extra = advance_deltas(advance_deltas({}, earlier), last)
    assert any("full" in name for name in extra) == (rank == 15)
    for size in (LoraSize(4, 0.8), LoraSize(2, 1.7)):
        factors = random_factors_of(resident, size.rank)
        resident.serve(factors, size=size, base_deltas=extra)
        expected = logits_with(factors, size.scaling, earlier, last)
        torch.testing.assert_close(resident.model(input_ids=IDS).logits, expected, rtol=0, atol=2e-5)
        with torch.no_grad():
            torch.testing.assert_close(resident.model(input_ids=IDS).logits, expected, rtol=0, atol=2e-5)
    assert float((expected - logits_with(factors, 1.7)).abs().max()) > 0.01


def random_factors_of(resident: ResidentModel, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {name: torch.randn(s, generator=generator) * 0.2 for name, s in resident.layout.shapes(rank).items()}


def test_whom_the_model_served_before_leaves_no_trace() -> None:
    # Ranks, gammas and base deltas in any order give the bits of a model that served nobody else.
    extras = [{}, advance_deltas({}, products(3)), advance_deltas({}, products(15, seed=1))]
    used = llama()
    for number, size in enumerate([LoraSize(4, 0.8), LoraSize(2, 1.7), LoraSize(5, 0.3), LoraSize(2, 0.9)] * 2):
        extra = extras[number % 3]
        factors = random_factors_of(used, size.rank)
        used.serve(factors, size=size, base_deltas=extra)
        fresh = llama()
        fresh.serve(factors, size=size, base_deltas=extra)
        assert (used.rank, used.scaling) == (size.rank, size.scaling)
        assert used.model(input_ids=IDS).logits.equal(fresh.model(input_ids=IDS).logits)


def test_no_base_deltas_give_back_the_bits_of_the_plain_model() -> None:
    resident = llama()
    plain = tiny_llama()(input_ids=IDS).logits
    for rank in (3, 15):
        resident.set_base_deltas(advance_deltas({}, products(rank)))
        assert not resident.model(input_ids=IDS).logits.equal(plain)
        resident.set_base_deltas({})
        assert resident.model(input_ids=IDS).logits.equal(plain)


def test_the_same_base_deltas_again_compute_nothing() -> None:
    resident = llama()
    extra = advance_deltas(advance_deltas({}, products(15)), products(1, seed=1))
    with CopyCounter() as first:
        resident.set_base_deltas(extra)
    with CopyCounter() as again:
        resident.set_base_deltas(dict(extra))
    others = {name: tensor.clone() for name, tensor in extra.items()}
    with CopyCounter() as equal_but_others:
        resident.set_base_deltas(others)
    assert len(first.bytes_written) == len(equal_but_others.bytes_written) > 0
    assert again.bytes_written == []
    logits = resident.model(input_ids=IDS).logits
    name = next(name for name in extra if name.startswith("fresh_left"))
    resident.set_base_deltas(others | {name: 2 * others[name]})
    assert not resident.model(input_ids=IDS).logits.equal(logits)


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("model.layers.0.mlp.up_proj", (40, 24), "model.layers.0.mlp.up_proj: a base delta of a module that is not"),
        ("nowhere", (24, 24), "nowhere: a base delta of a module that is not adapted"),
        ("model.layers.0.self_attn.v_proj", (24, 12), r"v_proj: a base delta \(24, 12\); expected \(12, 24\)"),
    ],
)
@pytest.mark.parametrize("rank", [1, 24], ids=["factors", "matrix"])
def test_base_deltas_that_do_not_fit_are_refused(path: str, shape: tuple[int, int], message: str, rank: int) -> None:
    extra = advance_deltas({}, {path: (torch.ones(shape[0], rank), torch.ones(rank, shape[1]))})
    with pytest.raises(AdapterError, match=message):
        llama().set_base_deltas(extra)


def test_gradients_and_steps_are_those_of_a_model_with_the_corrected_weights() -> None:
    merged = tiny_llama()
    added = products(3)
    with torch.no_grad():
        for path, (left, right) in added.items():
            merged.get_parameter(f"{path}.weight").add_(left @ right)
    expected = adapt(merged, target_modules="default", rank=4)
    expected.scaling = 0.8
    resident = llama()
    resident.set_base_deltas(advance_deltas({}, added))
    for model in (resident, expected):
        model.load(random_factors(model))
        loss_of(model).backward()
    for part in (Part.A, Part.B):
        largest = float(expected.flat_grad(part).abs().max())
        torch.testing.assert_close(resident.flat_grad(part), expected.flat_grad(part), rtol=0, atol=1e-5 * largest)


class CopyCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes written by every operator that is no view of its input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes_written: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            name = func.overloadpacket.__name__
            self.bytes_written.append((name, result.numel() * result.element_size()))
        return result


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert_classifier])
def test_changing_the_client_copies_its_adapter_once_in_and_once_out(build: Callable[[], PreTrainedModel]) -> None:
    heads = ["classifier"] if build is tiny_bert_classifier else []
    resident = adapt(build(), target_modules="default", rank=4, head_modules=heads)
    factors = random_factors(resident)
    adapter_bytes = sum(4 * tensor.numel() for tensor in factors.values())
    with CopyCounter() as load:
        resident.load(factors)
    assert [name for name, _ in load.bytes_written] == ["copy_"] * len(factors)
    assert sum(size for _, size in load.bytes_written) == adapter_bytes
    with CopyCounter() as read:
        resident.read()
    sizes = [size for _, size in read.bytes_written]
    assert len(sizes) == len(Part)  # one copy of each flat buffer, whatever the number of layers
    assert sum(sizes) == adapter_bytes


def test_a_refused_base_delta_leaves_the_former_ones_in_use() -> None:
    resident = adapt(tiny_llama(), target_modules=("q_proj", "v_proj"), rank=2)
    first, second = (target.path for target in resident.layout.targets[:2])
    good = {f"delta_full:{first}": torch.ones(24, 24)}
    ids = torch.arange(3, 9)[None]
    plain = resident.model(ids).logits
    resident.set_base_deltas(good)
    corrected = resident.model(ids).logits
    with pytest.raises(AdapterError, match="expected"):
        resident.set_base_deltas({f"delta_full:{first}": torch.zeros(24, 24), f"delta_full:{second}": torch.ones(3, 3)})
    assert resident.model(ids).logits.equal(corrected)
    assert not corrected.equal(plain)
    resident.set_base_deltas({})
    assert resident.model(ids).logits.equal(plain)
