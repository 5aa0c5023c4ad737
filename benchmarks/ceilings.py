"""Print what the machine is and what it reaches now: bytes a second of a copy (BW*), operations of a product (TC*)."""

import argparse
import json

from _common import measure_ceilings
from _rows import environment

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    found = measure_ceilings(device, 5)
    print(json.dumps(environment(device), indent=2))
    print(f"BW* {found.bandwidth / 1e9:.1f} GB/s, TC* {found.matmul_rate / 1e12:.2f} TFLOP/s")
