"""What each way of running attention takes. Checks and dispatch ask this table, and the documentation prints it."""

# feature: (least compute capability of the Triton kernels, torch's fused kernel of the CPU takes it, has a gradient)
# Where the fused kernel does not take a call, matmuls do, on the CPU and on other devices. None: no tensor of its own.
SUPPORT = {
    "float16, bfloat16, float32": (80, True, True),
    "float8_e4m3fn": (89, False, False),
    "D and Dv of 8, 16, ... 256, and 512": (80, True, True),
    "Dv other than D": (80, False, True),
    "H a multiple of Hk": (80, True, True),
    "causal": (80, True, None),
    "window_size": (80, True, None),
    "softcap": (80, False, None),
    "sinks": (80, True, True),
    "alibi_slopes": (80, True, False),
    "mask": (80, True, False),
    "q_scale, k_scale, v_scale": (89, False, False),
    "packed sequences": (80, True, None),
    "lse": (80, True, True),
    "no queries or no keys": (80, False, True),
}
NOT_DIFFERENTIABLE = frozenset(
    name for feature, (_, _, gradient) in SUPPORT.items() if gradient is False for name in feature.split(", ")
)
NOT_FUSED_ON_CPU = tuple(feature for feature, (_, fused, _) in SUPPORT.items() if not fused)
