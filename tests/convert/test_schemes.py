"""Schemes: what they make of a linear, which linears they refuse, and bad names."""

import pytest
import torch
from torch import nn

from fusedops.convert.schemes import SCHEMES, find_scheme
from fusedops.nn import Fp8Linear, Int8Linear, WeightOnlyLinear

CLASSES = {
    "int8": Int8Linear,
    "fp8": Fp8Linear,
    "int8-weight-only": WeightOnlyLinear,
    "fp8-weight-only": WeightOnlyLinear,
    "int4-weight-only": WeightOnlyLinear,
}


@pytest.mark.parametrize("name", SCHEMES)
def test_convert(name):
    """The module of the scheme, with its options, and as many bytes as were announced."""
    torch.manual_seed(0)
    linear = nn.Linear(100, 24, dtype=torch.bfloat16)
    scheme = SCHEMES[name]
    made = scheme.convert(linear)
    assert type(made) is CLASSES[name] and scheme.quantizes_activations == (name in ("int8", "fp8"))
    assert made.options.items() >= scheme.options.items()
    stored = sum(p.numel() * p.element_size() for key, p in made.named_parameters() if key != "bias")
    assert stored == scheme.stored_bytes(24, 100, torch.bfloat16)
    x = torch.randn(5, 100).to(torch.bfloat16)
    error = (made(x) - linear(x)).float().norm() / linear(x).float().norm()
    assert error < (0.15 if "int4" in name else 0.05)


def test_group_size():
    scheme = find_scheme("f", "int4-weight-only", 64)
    assert scheme.convert(nn.Linear(128, 8)).weight_scale.shape == (8, 2)
    assert SCHEMES["int4-weight-only"].convert(nn.Linear(128, 8)).weight_scale.shape == (8, 4)
    assert find_scheme("f", "int8-weight-only", 32).convert(nn.Linear(128, 8)).weight_scale.shape == (8, 4)
    assert find_scheme("f", "int8-weight-only").convert(nn.Linear(128, 8)).weight_scale.shape == (8,)


@pytest.mark.parametrize(
    ("name", "group_size", "message"),
    [
        ("int3", None, r"f: scheme must be one of 'int8', 'fp8', .*, got 'int3'"),
        (8, None, "f: scheme must be one of .*, got 8"),
        ("int8", 32, "f: group_size must be None for 'int8', got 32"),
        ("int4-weight-only", 48, "f: group_size must be None or one of 32, 64, 128, got 48"),
        ("int4-weight-only", True, "f: group_size must be None or one of 32, 64, 128, got True"),
    ],
)
def test_bad_scheme(name, group_size, message):
    with pytest.raises(ValueError, match=message):
        find_scheme("f", name, group_size)


@pytest.mark.parametrize(
    ("name", "linear", "reason"),
    [
        ("int8", nn.Linear(64, 64, dtype=torch.float64), "its weight is float64"),
        ("int8", nn.Linear(1, 64), r"too small: 320 bytes with its scales, 256 as it is"),
        ("int8", nn.Linear(2**17 + 1, 1, device="meta"), "in_features 131073 > 131072"),
        ("int8", nn.Linear(2**17, 1, device="meta"), None),
        ("fp8", nn.Linear(2**17 + 1, 1, device="meta"), None),
        ("int4-weight-only", nn.Linear(3, 8, dtype=torch.float16), None),
        ("int4-weight-only", nn.Linear(2, 8, dtype=torch.float16), "too small: 32 bytes"),
    ],
)
def test_obstacle(name, linear, reason):
    found = SCHEMES[name].obstacle(linear)
    assert found is None if reason is None else reason in found


def test_no_linear():
    with pytest.raises(TypeError, match="int8: linear must be a torch.nn.Linear, got Conv1d"):
        SCHEMES["int8"].convert(nn.Conv1d(4, 4, 1))
