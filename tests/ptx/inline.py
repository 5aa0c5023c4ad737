"""Small kernels written in PTX for one purpose, with registers and pointers already there."""

from fusedops.testing import ptx

REGISTERS = ".reg .pred %p<8>; .reg .b16 %h<32>; .reg .b32 %r<64>; .reg .b64 %d<32>; .reg .b128 %q<8>; .reg .b32 %t;"


def kernel(body, pointers="x out", declarations="", module=""):
    """A kernel `k` with a 64-bit register for each pointer, the thread's number in %t, and registers of each width."""
    names = pointers.split()
    parameters = ", ".join(f".param .u64 {name}_ptr" for name in names)
    loads = "\n".join(f".reg .b64 %{name}; ld.param.b64 %{name}, [{name}_ptr];" for name in names)
    return (
        f".version 8.7\n.target sm_90a\n.address_size 64\n{module}\n.visible .entry k({parameters})\n{{\n"
        f"{REGISTERS}\n{declarations}\nmov.u32 %t, %tid.x;\n{loads}\n{body}\nret;\n}}\n"
    )


def launch(text, arguments, block=(32,), grid=(1,), **options):
    return ptx.load(text).launch("k", grid, block, list(arguments), **options)
