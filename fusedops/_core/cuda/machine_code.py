"""The machine code of a CUDA kernel as a GPU would run it, to be read: no GPU is needed."""

import hashlib

from fusedops._core import cubin
from fusedops._core.cuda import images


def report_of(kernel, num_warps, shared_bytes):
    """(CubinReport, where the machine code is from) of a `cuda.Kernel` that is launched so.

    Shipped or cached machine code is read as it is. Where there is none, that of the one kernel is made of the PTX
    beside the sources, as a driver would; where that is not of these sources, the CUDA compiler is asked.

    Raises:
        RuntimeError: there is no machine code, and none can be made; the message says of what.
    """
    image, arch = _image(kernel.source, kernel.target)
    is_text = image.product.endswith(".ptx")
    origin = f"{image.product}, {image.origin}"
    assembler = ""
    if is_text:
        assembler = cubin.assembler()
        origin += f", assembled by {assembler}"
    parts = (image.content, kernel.symbol, arch, assembler, num_warps, shared_bytes)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:40]

    def read():
        code = cubin.assemble(image.content, kernel.symbol, arch) if is_text else image.content
        return cubin.read_kernel(code, kernel.symbol, arch, num_warps, shared_bytes)

    return cubin.kept(key, read), origin


def _image(source, target):
    """(image, architecture of its machine code): the best for a target that is there, or that can be made quickest."""
    products = images.products(target)
    best, text = products[0], products[-1]
    arch = best.removesuffix(".cubin") if best.endswith(".cubin") else target
    for product in dict.fromkeys((best, text)):
        image = images.kept(source, product)
        if image is not None:
            return image, arch
    return images.compile_now(source, target)[0], arch
