"""Print what the machine is and what it reaches now: bytes a second of a copy (BW*), operations of a product (TC*)."""

import argparse
import json

from _common import effort_of, measure_ceilings
from _rows import environment

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--quick", action="store_true", help="few rounds; on a CPU tiny sizes too")
    args = parser.parse_args()
    device, effort = args.device, effort_of(args.device, args.quick)
    found = measure_ceilings(device, effort)
    print(json.dumps(environment(device), indent=2))
    print(f"BW* {found.bandwidth / 1e9:.1f} GB/s, TC* {found.matmul_rate / 1e12:.2f} TFLOP/s")
