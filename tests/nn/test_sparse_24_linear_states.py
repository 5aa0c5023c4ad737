"""Sparse24Linear: state dicts, in files too, and those of other layers."""

import copy

import pytest
import torch

from fusedops.nn import Sparse24Linear
from fusedops.testing import make_tensor
from tests.nn.quantized_problems import assert_same
from tests.nn.test_sparse_24_linear import EVERY_FORMAT, sparse


@EVERY_FORMAT
@pytest.mark.parametrize("way", ["copied", "assigned", "to_empty", "safetensors"])
def test_state_dict_round_trip(format, way, tmp_path):
    layer = sparse(format, 30, 71, torch.bfloat16)
    state = layer.state_dict()
    other = Sparse24Linear(71, 30, device="cpu" if way == "copied" else "meta", dtype=torch.bfloat16, format=format)
    if way == "to_empty":
        other.to_empty(device="cpu")
    if way == "safetensors":
        files = pytest.importorskip("safetensors.torch")
        files.save_file(state, tmp_path / "layer.safetensors")
        state = files.load_file(tmp_path / "layer.safetensors")
    other.load_state_dict(state, assign=way in ("assigned", "safetensors"))
    assert_same(other.state_dict(), layer.state_dict())
    x = make_tensor((2, 71), torch.bfloat16, seed=2)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    assert {key: p.requires_grad for key, p in other.named_parameters()} == {key: key == "bias" for key in state}


REFUSED = {
    "a plain layer's weight": ("weight", lambda t: torch.zeros(24, 40), "of shape [24, 40]"),
    "other values": ("weight", lambda t: t.to(torch.int16), "got int16"),
    "a dense weight": ("weight", lambda t: torch.cat((t, t), -1)[..., :40], "of shape [1, 24, 40]"),
    "a byte less": ("metadata", lambda t: t[:, :-1], "of shape [24, 15]"),
    "signed bytes": ("metadata", lambda t: t.view(torch.int8), "got int8"),
    "another bias": ("bias", lambda t: t[:5], "of shape [5]"),
}


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("case", REFUSED)
def test_state_dict_that_does_not_fit(format, case):
    key, change, got = REFUSED[case]
    model = torch.nn.Sequential(sparse(format, 24, 40))
    before = copy.deepcopy(model.state_dict())
    state = {f"0.{k}": v for k, v in sparse(format, 24, 40, seed=9).state_dict().items()}
    state[f"0.{key}"] = change(state[f"0.{key}"])
    with pytest.raises(RuntimeError, match=f"Sparse24Linear: 0.{key} must be ") as raised:
        model.load_state_dict(state)
    assert got in str(raised.value)
    assert_same(model.state_dict(), before)


@EVERY_FORMAT
def test_a_plain_layer_refuses_the_state_dict(format):
    """Also of sizes at which the numbers of elements are the same, and where it is told to take what fits."""
    state = sparse(format, 24, 32, bias=False).state_dict()
    for strict in (True, False):
        for plain in (torch.nn.Linear(32, 24, bias=False), torch.nn.Linear(state["weight"].shape[-1], 24, bias=False)):
            with pytest.raises(RuntimeError, match="size mismatch for weight"):
                plain.load_state_dict(state, strict=strict)
