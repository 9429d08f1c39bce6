"""AdaptiveConfig and AdaptiveSparsityTrainer."""

import pytest
import torch
from torch import nn

from bs_modules import AdaptiveConfig, AdaptiveSparsityTrainer, BlockSparseAdaptive


def gate(**config):
    fields = {"block_size": 4, "hidden_dim": 8, "base_sparsity": 0.6, **config}
    return BlockSparseAdaptive(sparse_config=fields, num_heads=2, head_dim=8)


def run(model, length=48, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, 2, 8, generator=generator) for _ in range(3))
    return model(scale * q, scale * k, v, True)


def test_config_has_the_documented_defaults():
    assert AdaptiveConfig().to_dict() == {
        "base_sparsity": 0.9,
        "temperature": 1.0,
        "min_temperature": 0.1,
        "learnable_temperature": True,
        "hidden_dim": 128,
        "num_layers": 2,
        "share_across_heads": False,
        "block_size": 64,
        "learn_density": False,
        "row_budget": "even",
        "pooling": "mean_max",
        "gate": "straight_through",
        "distill_rows": 0,
    }


def test_config_converts_both_ways_and_speaks_of_densities_too():
    config = AdaptiveConfig(base_sparsity=0.75, query_block_size=1, learn_density=True, max_density=0.5)
    assert AdaptiveConfig.from_dict(config.to_dict()) == config
    pytest.importorskip("tomli_w")
    assert AdaptiveConfig.from_toml(config.to_toml()) == config
    assert config.blocks == (1, 64)
    assert config.sparsity_ratio == config.density == 0.25
    before = config.fingerprint()
    config.sparsity_ratio = 0.4
    assert config.base_sparsity == pytest.approx(0.6)
    assert config.fingerprint() != before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_sparsity": 1.0}, r"base_sparsity: expected a sparsity in \[0, 1\) .* got 1.0"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
        ({"temperature": 0.05}, "temperature: expected at least min_temperature=0.1, got 0.05"),
        ({"hidden_dim": 0}, "hidden_dim: expected an integer ≥ 1"),
        ({"pooling": "maen"}, "did you mean 'mean'"),
        ({"gate": "hard"}, "gate: expected one of straight_through, soft"),
        ({"max_density": 0.3}, "max_density: has no effect without learn_density=True"),
        ({"learn_density": True, "max_density": 0.05}, "max_density: expected at least 1 − base_sparsity = 0.1"),
        ({"distill_rows": -1}, "distill_rows: expected an integer ≥ 0"),
        ({"query_block_size": 0}, "query_block_size: expected an integer ≥ 1"),
    ],
)
def test_config_refuses_values(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"base_sparsity": "0.9"}, {"temperature": None}, {"learn_density": 1}, {"gate": 3}, {"block_size": (4, 4)}],
    ids=str,
)
def test_config_refuses_types(fields):
    with pytest.raises(TypeError, match=next(iter(fields))):
        AdaptiveConfig(**fields)
    with pytest.raises(AttributeError, match="no field 'sparsity'"):
        AdaptiveConfig().sparsity = 0.5
    with pytest.raises(TypeError, match="sparsity_ratio"):
        AdaptiveConfig().sparsity_ratio = None


@pytest.mark.parametrize("learnable", [False, True])
def test_the_temperature_falls_geometrically_and_stays(learnable):
    model = nn.ModuleList([gate(learnable_temperature=learnable), gate(learnable_temperature=learnable)])
    trainer = AdaptiveSparsityTrainer(model, 1.0, 0.25, annealing_steps=2)
    seen = [model[1].temperature.item()]
    for _ in range(3):
        trainer.step()
        seen.append(model[1].temperature.item())
    assert seen == pytest.approx([1.0, 0.5, 0.25, 0.25])
    assert isinstance(model[0].log_temperature, nn.Parameter) == learnable
    assert ("log_temperature" in dict(model[0].named_parameters())) == learnable


def test_a_learned_temperature_moves_and_is_bounded():
    module = gate(base_sparsity=0.5)
    run(module).square().sum().backward()
    assert module.log_temperature.grad.abs() > 0
    module.set_temperature(0.01)
    assert module.temperature.item() == pytest.approx(0.1)


def test_state_round_trip_and_bad_states():
    model = gate()
    trainer = AdaptiveSparsityTrainer(model, 1.0, 0.1, annealing_steps=10)
    for _ in range(4):
        trainer.step()
    other = AdaptiveSparsityTrainer(gate(), 0.8, 0.5, annealing_steps=3)
    other.load_state_dict(trainer.state_dict())
    assert other.temperature == trainer.temperature
    assert other.model.temperature.item() == pytest.approx(trainer.temperature)
    with pytest.raises(ValueError, match="state: expected the keys"):
        other.load_state_dict({"current_step": 1})
    with pytest.raises(ValueError, match="current_step"):
        other.load_state_dict({**trainer.state_dict(), "current_step": -1})
    assert other.current_step == 4


def test_losses_of_all_gates_are_weighed_and_trained():
    model = nn.ModuleList([gate(learn_density=True, distill_rows=4), gate(learn_density=True, distill_rows=4)])
    trainer = AdaptiveSparsityTrainer(model, sparsity_weight=0.5, distillation_weight=2.0)
    with pytest.raises(RuntimeError, match="loss: expected a forward in training mode"):
        trainer.loss()
    for seed, module in enumerate(model):
        run(module, seed=seed)
    losses = [module.gate_losses for module in model]
    wanted = sum(0.5 * item["sparsity"] + 2.0 * item["distillation"] for item in losses) / 2
    torch.testing.assert_close(trainer.loss(), wanted)
    trainer.loss().backward()
    assert (model[0].scorer.threshold.grad != 0).all()
    assert float(AdaptiveSparsityTrainer(gate()).loss()) == 0


def test_the_sparsity_loss_moves_a_learned_density_and_what_was_met_is_reported():
    torch.manual_seed(0)
    model = gate(learn_density=True, base_sparsity=0.5, max_density=0.9)
    trainer = AdaptiveSparsityTrainer(model, sparsity_weight=1.0)
    optimizer = torch.optim.Adam(model.scorer.parameters(), lr=0.1)

    def met():
        model.eval()
        run(model)
        model.train()
        return trainer.report()

    before = met()
    for step in range(25):
        run(model, seed=step)
        optimizer.zero_grad()
        trainer.loss().backward()
        optimizer.step()
    after = met()
    assert before["asked"] == after["asked"] == 0.5
    assert after["density"] < 0.6 * before["density"]
    assert model.get_pattern_stats()["measured"]


def test_distillation_teaches_the_ranking_of_attention():
    torch.manual_seed(0)
    model = gate(distill_rows=48, base_sparsity=0.8, learnable_temperature=False, query_block_size=1)
    with torch.no_grad():
        model.scorer.gain.zero_()  # so that it knows nothing at first
    trainer = AdaptiveSparsityTrainer(model, distillation_weight=1.0)
    optimizer = torch.optim.Adam(model.scorer.parameters(), lr=0.02)
    losses = []
    for step in range(30):
        run(model, seed=step, scale=2.0)
        optimizer.zero_grad()
        trainer.loss().backward()
        losses.append(float(trainer.loss().detach()))
        optimizer.step()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_bad_arguments():
    with pytest.raises(TypeError, match="model: expected a module"):
        AdaptiveSparsityTrainer("model")
    with pytest.raises(ValueError, match="model: expected a BlockSparseAdaptive"):
        AdaptiveSparsityTrainer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="sparsity_weight: expected 0"):
        AdaptiveSparsityTrainer(gate(), sparsity_weight=1.0)
    with pytest.raises(ValueError, match="distillation_weight: expected 0"):
        AdaptiveSparsityTrainer(gate(), distillation_weight=1.0)
    with pytest.raises(ValueError, match=r"final_temperature: expected at least the gates' min_temperature=0.1"):
        AdaptiveSparsityTrainer(gate(), final_temperature=0.01)
    with pytest.raises(TypeError, match="initial_temperature"):
        AdaptiveSparsityTrainer(gate(), "hot")
    with pytest.raises(ValueError, match="annealing_steps"):
        AdaptiveSparsityTrainer(gate(), annealing_steps=0)
