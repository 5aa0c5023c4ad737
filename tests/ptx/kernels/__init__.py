"""Triton kernels that the tests run compiled, on the CPU."""

import triton

from fusedops.testing import ptx

# Before 3.7.1 (triton-lang/triton#10537) wgmma reads what cp.async wrote without the fence.proxy.async that the PTX ISA
# asks for, and the check finds it.
_FENCED = tuple(map(int, triton.__version__.split("+")[0].split(".")[:3])) >= (3, 7, 1)
CHECKS_OF_POINTERS = "all" if _FENCED else tuple(name for name in ptx.CHECKS if name != "proxies")
