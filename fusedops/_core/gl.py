"""Device functions in Gluon that several operators' kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    """NUM barriers in shared memory that wait for ARRIVALS arrivals each."""
    made = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made
