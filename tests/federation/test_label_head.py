"""Losses at labelled positions only. The oracle is the plain one: all logits of the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sfedlora.errors import AdapterError, ModelError
from sfedlora.federation.label_head import label_losses
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.lora.layer import LoraLinear
from sfedlora.types import Part
from support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_opt, tiny_qwen2

RANK = 2
LENGTHS = torch.tensor([5, 11, 8, 11, 3, 9])
FIRST_LABELS = torch.tensor([2, 10, 3, 11, 1, 0])  # one label, none at all, and one that nothing predicts
REAL = torch.arange(11) < LENGTHS[:, None]
IDS = torch.randint(3, VOCAB_SIZE, (6, 11), generator=torch.Generator().manual_seed(0)).where(REAL, 0)
LABELS = IDS.where(REAL & (torch.arange(11) >= FIRST_LABELS[:, None]), -100)
NUM_ROWS = int((LABELS[:, 1:] != -100).sum())
INPUTS = {"input_ids": IDS, "attention_mask": REAL.long()}
WEIGHTS = torch.linspace(0.1, 2.0, 6)  # as of clients with unequal label counts in one batch


def stock(class_name: str, **settings: Any) -> PreTrainedModel:
    """A tiny random model of one of transformers' classes."""
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(model_class.config_class(**{**shape, **settings}))
    return model.eval()


def capped_gemma3() -> PreTrainedModel:
    return stock("Gemma3ForCausalLM", final_logit_softcapping=0.05, **GEMMA)


GEMMA = {"head_dim": 6, "query_pre_attn_scalar": 6}
# Caps and scales are so strong that leaving one out cannot pass.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "gpt-neox": lambda: stock("GPTNeoXForCausalLM"),
    "gpt-neo": lambda: stock("GPTNeoForCausalLM", num_layers=2, num_heads=4, attention_types=[[["global"], 2]]),
    "gptj": lambda: stock("GPTJForCausalLM", rotary_dim=4),
    "bloom": lambda: stock("BloomForCausalLM"),
    "phi-bias": lambda: stock("PhiForCausalLM", num_attention_heads=3, num_key_value_heads=3),
    "gemma": lambda: stock("GemmaForCausalLM", head_dim=6),
    "gemma2-cap": lambda: stock("Gemma2ForCausalLM", final_logit_softcapping=0.05, **GEMMA),
    "gemma3-cap": capped_gemma3,
    "cohere-scale": lambda: stock("CohereForCausalLM", logit_scale=7.0),
    "granite-scale": lambda: stock("GraniteForCausalLM", logits_scaling=0.1),
    "mixtral": lambda: stock("MixtralForCausalLM", num_local_experts=3, output_router_logits=True),
    "mamba": lambda: stock("MambaForCausalLM", state_size=4),
    "bert-decoder": lambda: stock("BertLMHeadModel", is_decoder=True),  # dense layer and norm below the output head
}


def full_losses(model: PreTrainedModel, **more: Any) -> Tensor:
    """(batch,) summed losses of the examples, from all logits."""
    logits = model(**{**INPUTS, **more}, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), LABELS[:, 1:].flatten(), reduction="none")
    return losses.view(len(IDS), -1).sum(1)


def sparse_losses(model: PreTrainedModel, chunk_rows: int | None = None) -> Tensor:
    return label_losses(model, INPUTS, LABELS, chunk_rows=chunk_rows).sum(1)


def adapted(model: PreTrainedModel, targets: str | list[str] = "all-linear", **settings: Any) -> ResidentModel:
    resident = adapt(model, target_modules=targets, rank=RANK, **settings)
    generator = torch.Generator().manual_seed(7)
    resident.load({n: torch.randn(s, generator=generator) * 0.2 for n, s in resident.layout.shapes(RANK).items()})
    return resident


def gradients(resident: ResidentModel, losses: Callable[[PreTrainedModel], Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of the examples, and the gradient of their weighted sum."""
    resident.zero_grad()
    found = losses(resident.model)
    (found * WEIGHTS).sum().backward()  # type: ignore[no-untyped-call]
    return found.detach(), torch.cat([resident.flat_grad(part) for part in Part])


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0
    assert torch.linalg.vector_norm(found - expected) <= 1e-6 * torch.linalg.vector_norm(expected)


def assert_same_as_full(resident: ResidentModel, chunk_rows: int | None = None) -> None:
    expected, expected_gradient = gradients(resident, full_losses)
    found, gradient = gradients(resident, lambda model: sparse_losses(model, chunk_rows))
    assert_same(found, expected)
    assert_same(gradient, expected_gradient)
    with torch.no_grad():
        assert_same(sparse_losses(resident.model, chunk_rows), expected)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_losses_and_gradients_of_every_family(family: Callable[[], PreTrainedModel]) -> None:
    assert_same_as_full(adapted(family()), chunk_rows=4)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, NUM_ROWS - 1, NUM_ROWS, NUM_ROWS + 1, None])
@pytest.mark.parametrize("family", ["llama", "gemma2-cap"])
def test_any_chunk_size_gives_the_same(family: str, chunk_rows: int | None) -> None:
    assert_same_as_full(adapted(FAMILIES[family]()), chunk_rows)


def test_the_loss_of_every_token_is_in_its_place() -> None:
    model = tiny_llama()
    with torch.no_grad():
        losses, logits = label_losses(model, INPUTS, LABELS, chunk_rows=3), model(**INPUTS).logits
    assert losses.shape == (6, 10)
    for example, place in torch.cartesian_prod(torch.arange(6), torch.arange(1, 11)).tolist():
        label = int(LABELS[example, place])
        expected = 0.0 if label == -100 else -float(logits[example, place - 1].log_softmax(0)[label])
        assert float(losses[example, place - 1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("trained_head", [False, True])
def test_without_any_label_the_loss_is_zero_and_so_is_its_gradient(trained_head: bool) -> None:
    resident = adapted(tiny_qwen2(), head_modules=("lm_head",) if trained_head else ())
    losses = label_losses(resident.model, INPUTS, torch.full_like(LABELS, -100))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert (losses == 0).all()
    assert all((resident.flat_grad(part) == 0).all() for part in Part)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted(tiny_qwen2(), ["q_proj", "lm_head"]),
        lambda: adapted(tiny_llama(), ["q_proj", "lm_head"]),  # tied to the embeddings
        lambda: adapted(tiny_llama(), ["lm_head"]),  # nothing trained below it
        lambda: adapted(capped_gemma3(), ["q_proj", "lm_head"]),
        lambda: adapted(tiny_qwen2(), ["q_proj"], head_modules=("lm_head",)),  # trained in full
    ],
    ids=["untied", "tied", "alone", "capped", "in-full"],
)
def test_a_trained_output_head(make: Callable[[], ResidentModel]) -> None:
    resident = make()
    assert_same_as_full(resident, chunk_rows=4)
    trained = [p.grad for p in resident.model.lm_head.parameters() if p.requires_grad]
    assert trained
    assert all(gradient.abs().max() > 0 for gradient in trained)


def test_a_stock_model_with_all_weights_trained() -> None:
    model = tiny_llama()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(full_losses(model).sum(), parameters)
    found = torch.autograd.grad(sparse_losses(model, 4).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_gradient_checkpointing() -> None:
    resident = adapted(tiny_llama())
    expected = gradients(resident, full_losses)
    resident.enable_gradient_checkpointing()
    found = gradients(resident, lambda model: sparse_losses(model, 4))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("family", ["llama", "gemma2-cap", "cohere-scale"])
def test_a_bfloat16_base_rounds_no_more_than_full_logits_do(family: str) -> None:
    exact = adapted(FAMILIES[family]().to(torch.bfloat16).float())
    rounded = adapted(FAMILIES[family]().to(torch.bfloat16))
    truth = gradients(exact, full_losses)
    full = gradients(rounded, full_losses)
    found = gradients(rounded, lambda model: sparse_losses(model, 4))
    for one, other, true in zip(found, full, truth, strict=True):
        assert one.dtype == torch.float32
        allowed = 1.2 * torch.linalg.vector_norm(other - true)
        assert 0 < torch.linalg.vector_norm(one - true) <= allowed


class LargestLogits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most rows of any tensor with the vocabulary as its last dimension; views of weights do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = 0
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            of_logits = isinstance(value, Tensor) and value.ndim > 0 and value.shape[-1] == VOCAB_SIZE
            if of_logits and value.untyped_storage().data_ptr() not in self.weights:
                self.rows = max(self.rows, value.numel() // VOCAB_SIZE)
        return result


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2-cap"])
def test_no_tensor_holds_more_logits_than_a_chunk(family: str, targets: list[str]) -> None:
    resident = adapted(FAMILIES[family](), targets)
    with LargestLogits(resident.model) as everything:
        full_losses(resident.model)
    assert everything.rows == IDS.numel()
    with LargestLogits(resident.model) as training:
        gradients(resident, lambda model: sparse_losses(model, 4))
    with LargestLogits(resident.model) as evaluation, torch.no_grad():
        sparse_losses(resident.model, 4)
    assert (training.rows, evaluation.rows) == (4, 4)


def test_the_usual_chunk_shrinks_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfedlora.federation.label_head._CPU_LOGITS", 3 * VOCAB_SIZE + 1)
    model = tiny_llama().requires_grad_(False)
    with LargestLogits(model) as seen:
        sparse_losses(model)
    assert seen.rows == 3


def own_forwards(model: nn.Module) -> dict[str, object]:
    return {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__}


def test_nothing_is_left_on_the_model() -> None:
    resident = adapted(tiny_opt())
    gradients(resident, lambda model: sparse_losses(model, 4))
    assert own_forwards(resident.model) == {}


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_left_when_the_output_head_fails(grad: bool) -> None:
    resident = adapted(tiny_qwen2())

    def fail(*_: object) -> None:
        raise RuntimeError("in the head")

    handle = resident.model.lm_head.register_forward_pre_hook(fail)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="in the head"):
        sparse_losses(resident.model, 4)
    handle.remove()
    assert own_forwards(resident.model) == {}
    assert_same_as_full(resident, 4)


def test_a_forward_of_the_trunk_s_own_stays() -> None:
    # accelerate puts one there to move weights
    resident = adapted(tiny_qwen2())
    original, calls = resident.model.model.forward, []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    resident.model.model.forward = own
    sparse_losses(resident.model, 4)
    assert own_forwards(resident.model) == {"model": own}
    assert calls == [1]


def stack_of(singles: list[ResidentModel], model: PreTrainedModel, dropout: float) -> ResidentModel:
    """One model that carries the pairs of all."""
    resident = adapt(model, target_modules=["q_proj", "lm_head"], rank=RANK, dropout=dropout)
    for name, module in resident.model.named_modules():
        if isinstance(module, LoraLinear):
            each = [single.model.get_submodule(name) for single in singles]
            module.set_factors(torch.stack([m.a.detach() for m in each]), torch.stack([m.b.detach() for m in each]))
    return resident


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_a_stack_of_pairs_on_the_output_head_equals_each_client_alone(chunk_rows: int | None, dropout: float) -> None:
    singles = [adapted(tiny_qwen2(), ["q_proj", "lm_head"], dropout=dropout) for _ in range(3)]
    for number, single in enumerate(singles):
        single.load({name: value * (number + 1) for name, value in single.read().items()})
    stacked = stack_of(singles, tiny_qwen2(), dropout)
    seeds = (11, 12, 13)
    if dropout:
        stacked.dropout.seeds = seeds
    together = label_losses(stacked.model, INPUTS, LABELS, chunk_rows=chunk_rows)
    together.sum().backward()  # type: ignore[no-untyped-call]
    for number, single in enumerate(singles):
        if dropout:
            single.dropout.seeds = seeds[number : number + 1]
        mine = slice(2 * number, 2 * number + 2)
        alone = label_losses(single.model, {k: v[mine] for k, v in INPUTS.items()}, LABELS[mine], chunk_rows=2)
        single.zero_grad()
        alone.sum().backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(together[mine], alone, rtol=1e-5, atol=1e-6)
        for path in ("lm_head", "model.layers.1.self_attn.q_proj"):
            stack, own = stacked.model.get_submodule(path), single.model.get_submodule(path)
            assert own.b.grad.abs().max() > 0
            torch.testing.assert_close(stack.b.grad[number], own.b.grad, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(stack.a.grad[number], own.a.grad, rtol=1e-5, atol=1e-6)


def test_the_chunk_of_a_stack_is_shared_by_its_clients() -> None:
    stacked = stack_of([adapted(tiny_qwen2(), ["q_proj", "lm_head"]) for _ in range(3)], tiny_qwen2(), 0.0)
    with LargestLogits(stacked.model) as seen, torch.no_grad():
        sparse_losses(stacked.model, chunk_rows=7)
    assert seen.rows == 6


def test_a_stack_that_does_not_divide_the_batch_is_refused() -> None:
    singles = [adapted(tiny_qwen2(), ["q_proj", "lm_head"]) for _ in range(4)]
    stacked = stack_of(singles, tiny_qwen2(), 0.0)
    with pytest.raises(AdapterError, match="stack of 4 clients"):
        sparse_losses(stacked.model)


def test_masks_on_the_output_head_do_not_depend_on_the_chunks() -> None:
    resident = adapted(tiny_qwen2(), ["lm_head"], dropout=0.5)
    plain = sparse_losses(resident.model, 2).detach()
    resident.dropout.seeds = (5,)
    by_two, at_once = gradients(resident, lambda m: sparse_losses(m, 2)), gradients(resident, sparse_losses)
    assert by_two[0].equal(at_once[0])
    assert by_two[1].equal(at_once[1])
    assert not torch.allclose(plain, by_two[0])


def test_a_model_without_a_trunk_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaModel holds no inner model"):
        label_losses(tiny_llama().model, INPUTS, LABELS)


class BypassesItsTrunk(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(torch.ones(*input_ids.shape, 24)))


def test_a_model_that_bypasses_its_trunk_is_refused() -> None:
    model = tiny_llama()
    model.__class__ = BypassesItsTrunk
    with pytest.raises(ModelError, match="BypassesItsTrunk does not call the models inside it"):
        label_losses(model, INPUTS, LABELS)
    assert own_forwards(model) == {}
