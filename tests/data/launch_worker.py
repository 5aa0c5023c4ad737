"""Make real launches on CPU tensors, but compile each kernel for a GPU instead of running it.

Run without TRITON_INTERPRET. What Triton would specialise (None, 1, multiples of 16, 64-bit integers) is taken from the
arguments of the launch itself, so every variant that a call can reach is compiled as a GPU would get it.
Prints one JSON line per launch.
"""

import json
import sys

import torch
from triton.runtime.jit import JITFunction

from fusedops._core import cubin
from fusedops._core.launch import KernelExample
from fusedops.ops.gated_activation import _triton as gated
from fusedops.ops.layer_norm import _triton as layer
from fusedops.ops.rms_norm import _triton as rms
from fusedops.ops.rotary import _triton as rotary

SHAPES = {torch.bfloat16: ((1, 4096), (3, 77), (2, 40000)), torch.float32: ((8, 576),)}
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
compiled = []  # (what was called, the kernel) of each launch
label = ""


def compile_launch(self, *args, grid, warmup, **kwargs):
    """Stands in for JITFunction.run."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    given = dict(zip(self.arg_names, args)) | kwargs
    types, constants, divisible = {}, {}, []
    for parameter in self.params:
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            types[parameter.name], number = TYPES[value.dtype], value.data_ptr()
        elif isinstance(value, float):
            types[parameter.name], number = "fp32", 1
        else:
            types[parameter.name], number = "i32" if -(2**31) <= value < 2**31 else "i64", value
        if number % 16 == 0:
            divisible.append(parameter.name)
    example = KernelExample(self, types, constants, tuple(divisible), **options)
    compiled.append((label, cubin.compile_example(example, sys.argv[1])))


def launches():
    """(label, call) of every kind of launch: decode, prompt, long rows, options left out, strides, odd sizes."""
    eps = 1e-6
    for dtype, shapes in SHAPES.items():
        for rows, n in shapes:
            x, r, g = (torch.zeros(rows, n, dtype=dtype) for _ in range(3))
            w, b = torch.zeros(n, dtype=dtype), torch.zeros(n)
            name = f"{dtype} {rows}x{n}"
            yield f"rms_norm {name}", lambda x=x, w=w: rms.rms_norm(x, w, eps, 0.0, "llama")
            yield f"rms_norm no weight {name}", lambda x=x: rms.rms_norm(x, None, eps, 0.0, "once")
            yield f"add_rms_norm {name}", lambda x=x, r=r, b=b: rms.add_rms_norm(x, r, b, eps, 1.0, "once")
            yield f"add_rms_norm_ {name}", lambda x=x, r=r, w=w: rms.add_rms_norm_(x, r, w, eps, 0.0, "once")
            yield f"rms backward {name}", lambda x=x, g=g, w=w: rms.rms_norm_backward(g, x, w, eps, 0.0, None)
            yield f"rms backward no weight {name}", lambda x=x, g=g: rms.rms_norm_backward(g, x, None, eps, 0.0, g)
            yield f"layer_norm {name}", lambda x=x, w=w: layer.layer_norm(x, w, None, eps)
            yield f"layer_norm bare {name}", lambda x=x: layer.layer_norm(x, None, None, eps)
            yield f"add_layer_norm {name}", lambda x=x, r=r, w=w, b=b: layer.add_layer_norm(x, r, w, b, eps)
            yield f"layer backward {name}", lambda x=x, g=g, w=w, b=b: layer.layer_norm_backward(g, x, w, b, eps, None)
            yield f"silu_mul {name}", lambda x=x, r=r: gated.silu_mul(x, r)
            yield f"gelu_mul backward {name}", lambda x=x, r=r, g=g: gated.gelu_mul_backward(g, x, r, "tanh")
        packed = torch.zeros(5, 3, 2048, dtype=dtype).transpose(0, 1)
        halves = packed.chunk(2, -1)
        yield f"silu_mul packed {dtype}", lambda halves=halves: gated.silu_mul(*halves)
        yield f"rms_norm strided {dtype}", lambda x=halves[1]: rms.rms_norm(x, None, eps, 0.0, "once")
        for heads, kv_heads, length, size in ((1, 1, 1, 64), (9, 3, 1, 64), (32, 8, 7, 128)):
            q, k = (torch.zeros(2, h, length, size, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads))
            table = torch.zeros(1, length, size - 8 * (heads == 9))
            for interleaved in (False, True):
                yield (
                    f"rotary {dtype} {heads}/{kv_heads} {length} {interleaved}",
                    lambda q=q, k=k, t=table, i=interleaved: rotary.rotary(q, k, t, t, i),
                )


JITFunction.run = compile_launch
for label, call in launches():  # noqa: B007 compile_launch reads the label
    call()
for (launch, _), report in zip(compiled, cubin.read_all([kernel for _, kernel in compiled]), strict=True):
    print(json.dumps({"launch": launch, **report.as_dict()}))
