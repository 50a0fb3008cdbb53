"""Recorded routing of tiny random Hugging Face models against the models themselves."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.toy_families import DENSE_FIRST, FAMILIES, family_model, recomputed
from traces.record.generate import Answer, Sampling, answer, route
from traces.record.huggingface import TESTED, HuggingFaceModel, find_routers

GREEDY = Sampling(n_tokens=8, temperature=0)
LENGTHS = (5, 14, 9)  # of the prompts of one batch, so two of them are padded


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_prompts() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 63, size=n) for n in LENGTHS]


def recorded(family: str) -> tuple[HuggingFaceModel, list[Answer]]:
    model = HuggingFaceModel(family_model(family), stop_ids=())
    rngs = [np.random.default_rng(b) for b in range(3)]
    return model, answer(model, make_prompts(), GREEDY, rngs)


def test_the_tested_families_are_those_of_the_table() -> None:
    assert set(FAMILIES) == set(TESTED)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_gates_are_those_of_the_models_own_logits(family: str) -> None:
    """Every row of a padded batch, prefill and decode, against numpy on the routers' inputs."""
    model = HuggingFaceModel(family_model(family), stop_ids=())
    seen: list[torch.Tensor] = []
    handles = [
        router.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32)))
        for router in model.routers
    ]
    try:
        answers = answer(model, make_prompts(), GREEDY, [np.random.default_rng(0)] * 3)
    finally:
        for handle in handles:
            handle.remove()
    n_layers, n_passes = len(model.routers), 1 + GREEDY.n_tokens
    assert len(seen) == n_layers * n_passes
    for layer, router in enumerate(model.routers):
        inputs = [x.reshape(3, -1, 32) for x in seen[layer::n_layers]]
        for b, answered in enumerate(answers):
            x = torch.cat([inputs[0][b, -LENGTHS[b] :], *(i[b] for i in inputs[1:])])
            ids, gates = recomputed(family, router, x.double().numpy())
            np.testing.assert_array_equal(answered.expert_ids[:, layer], ids)
            np.testing.assert_allclose(answered.gate_weights[:, layer], gates, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_are_what_the_experts_are_given(family: str) -> None:
    model = HuggingFaceModel(family_model(family), stop_ids=())
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = [m for name, m in model.model.named_modules() if name.endswith(".experts")]
    handles = [
        e.register_forward_pre_hook(lambda _, args: given.append((args[1], args[2])))
        for e in experts
    ]
    try:
        rows = route(model, make_prompts()[1])
    finally:
        for handle in handles:
            handle.remove()
    assert len(given) == len(model.routers)
    for layer, (ids, weights) in enumerate(given):
        dense = torch.zeros(len(ids), model.n_experts).scatter(1, ids, weights.float()).numpy()
        ours = np.zeros_like(dense)
        np.put_along_axis(
            ours, rows.ids[:, layer].astype(int), rows.gates[:, layer].astype(np.float32), axis=1
        )
        np.testing.assert_allclose(ours, dense, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_one_teacher_forced_pass(family: str) -> None:
    """No near ties on these weights: all sets agree, and gates to half precision."""
    model, answers = recorded(family)
    for answered in answers:
        rows = route(model, answered.tokens)
        np.testing.assert_array_equal(answered.expert_ids, rows.ids)
        np.testing.assert_allclose(answered.gate_weights, rows.gates, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_changes_nothing_and_says_what_generate_says(family: str) -> None:
    source = family_model(family)
    hooks = {name: len(m._forward_hooks) for name, m in source.named_modules()}
    before = generate(source)
    _, answers = recorded(family)
    assert [a.tokens[a.n_prompt :].tolist() for a in answers] == before
    assert generate(source) == before
    assert {name: len(m._forward_hooks) for name, m in source.named_modules()} == hooks


def generate(model: Any) -> list[list[int]]:
    longest = max(LENGTHS)
    tokens, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest).long()
    for b, prompt in enumerate(make_prompts()):
        tokens[b, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[b, longest - len(prompt) :] = 1
    said = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=GREEDY.n_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return said[:, longest:].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_is_read_from_the_model(family: str) -> None:
    model = HuggingFaceModel(family_model(family))
    first = 1 if family in DENSE_FIRST else 0
    assert model.layer_ids == tuple(range(first, 3))
    assert model.n_experts == 8
    assert model.top_k == model.config.num_experts_per_tok
    assert model.stop_ids == {63}
    bias = 128 if family == "gpt_oss" else 0  # of 2 * 16 + 32 outputs in float32
    assert model.expert_bytes == (3 * 16 * 32 * 4 + 2 * bias,) * len(model.layer_ids)


class LinearGate(nn.Module):
    """A block as transformers v4 has it: an ``nn.Linear`` that returns logits and nothing else."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        router = getattr(block, "gate", None) or block.router
        self._router = [router]  # in a list, so that it is no part of the model
        self.gate = nn.Linear(32, router.num_experts, bias=False)
        self.gate.weight = router.weight
        self.experts = block.experts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.gate(flat := hidden.reshape(-1, 32))
        _, weights, ids = self._router[0](flat)
        mixed: torch.Tensor = self.experts(flat, ids, weights)
        return mixed.reshape(hidden.shape)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "phimoe", "granitemoe"])
def test_choice_is_recomputed_where_the_gate_returns_logits(family: str) -> None:
    expected = [a.expert_ids for a in recorded(family)[1]]
    gates = [a.gate_weights for a in recorded(family)[1]]
    model = family_model.__wrapped__(family)
    for name, _ in find_routers(model):
        block = name.rpartition(".")[0]
        model.set_submodule(block, LinearGate(model.get_submodule(block)))
    wrapped = HuggingFaceModel(model, stop_ids=())
    assert all(type(router) is nn.Linear for router in wrapped.routers)
    answers = answer(wrapped, make_prompts(), GREEDY, [np.random.default_rng(0)] * 3)
    for answered, ids, weights in zip(answers, expected, gates, strict=True):
        np.testing.assert_array_equal(answered.expert_ids, ids)
        np.testing.assert_allclose(answered.gate_weights, weights, atol=1e-3)


def test_unknown_rule_for_logits_is_an_error() -> None:
    model = family_model.__wrapped__("mixtral")
    for name, _ in find_routers(model):
        block = name.rpartition(".")[0]
        model.set_submodule(block, LinearGate(model.get_submodule(block)))
    model.config.model_type = "novel_moe"
    with pytest.raises(
        ValueError, match=r"mlp\.gate \(Linear\) returns logits alone, .* novel_moe"
    ):
        route(HuggingFaceModel(model), np.array([1, 2]))


def test_layers_of_different_top_k_are_refused() -> None:
    model = family_model.__wrapped__("mixtral")
    model.model.layers[1].mlp.gate.top_k = 1
    with pytest.raises(ValueError, match=r"mixtral: .* the same top_k, got \[\(8, 1\), \(8, 2\)\]"):
        HuggingFaceModel(model)


def test_weights_fall_by_rank_but_for_phimoe() -> None:
    for family in FAMILIES:
        gates = recorded(family)[1][1].gate_weights.astype(float)
        falls = bool((gates[..., :-1] >= gates[..., 1:]).all())
        assert falls == (family != "phimoe"), family
