"""The CUDA kernels of sparse_matmul on a GPU; in a dry run their PTX is emulated."""

import pytest
import torch

from fusedops.testing import assert_accurate
from tests.gpu.common import DEVICE, same_bits, sized
from tests.ops.common import using
from tests.ops.sparse_problems import CODES, FP8, Call, call_of, integers, masked

pytestmark = pytest.mark.gpu
ON_GPU = DEVICE == "cuda"
BY = "cuda" if ON_GPU else "emulate-sm_90a"
FLOAT8 = not ON_GPU or torch.cuda.get_device_capability() == (9, 0)  # others have no sparse product of it here
DTYPES = [torch.bfloat16, torch.float16, torch.int8, *((FP8,) if FLOAT8 else ())]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = sized(
    [(65, 1, 64), (66, 130, 100), (128, 4096, 4096), (513, 6144, 4096), (2048, 4096, 1032), (1000, 2000, 3000)],
    [(65, 1, 64), (66, 130, 100)],
)


def moved(call):
    """The call with everything on the device."""

    def there(x):
        return x.to(DEVICE) if isinstance(x, torch.Tensor) else x

    call.a, call.weight, call.args = there(call.a), there(call.weight), tuple(map(there, call.args))
    call.options = {name: there(value) for name, value in call.options.items()}
    return call


def same_place(x):
    """A tensor on the device in a copy of all of its memory: at the same place and with the same strides."""
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return memory.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_integers_are_the_dense_product(dtype, shape):
    rows, columns, depth = shape
    a, weight = integers((rows, depth), dtype, 1), masked(integers((columns, depth), dtype, 2), 3)
    options = {"bias": integers((columns,), torch.float32, 4, 9), "activation": "relu"}
    if dtype in CODES:
        options |= {"out_dtype": torch.float32, "scale_b": torch.full((columns,), 0.25)}
    call = moved(Call(a, weight, options))
    with using(BY):
        assert torch.equal(call.run(), call.truth().to(call.out_dtype()))


@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_and_the_same_bits_every_time(dtype, shape):
    """B37: pytorch/pytorch#155333: 2:4 products that were wrong, and not the same twice."""
    call = moved(call_of(dtype, *shape, bias=torch.float32, activation="silu"))
    with using(BY):
        out = call.run()
        assert all(same_bits(call.run(), out) for _ in range(sized(20, 1)))
    assert_accurate(out, call.truth(), zeros=False)


@EACH_DTYPE
@pytest.mark.parametrize("layout", ["padded", "sliced", "offset:3"])
def test_strides_and_addresses(dtype, layout):
    """B38: pytorch/pytorch#109175, #110664: dense operands that were not contiguous. Memory between rows is NaN."""
    call = call_of(dtype, 70, 65, 100, layout=layout, offset=3)
    if ON_GPU:
        here = tuple(same_place(x) for x in call.args)
        moved(call)
        call.a, call.args = here[0], here
    with using(BY):
        assert_accurate(call.run(), call.truth(), zeros=False)
