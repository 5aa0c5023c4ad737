"""Read nvdisasm's listing of kernels: their instructions, their loops, and where registers are spilled.

The listings are of raw machine code, several kernels one behind the other: nvdisasm takes ten times as long to start as
to list a kernel. So jumps name addresses, not labels.
"""

import bisect
import itertools
import re
from collections import Counter

_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_DESTINATION = re.compile(r"(?:^|[\s,])0x(?P<address>[0-9a-f]+)\s*$")
_JUMPS = ("BRA", "JMP", "CALL")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")
_SPILLS = ("STL", "LDL")
GLOBAL_LOADS = ("LDG", "LDGSTS", "UTMALDG")
GLOBAL_STORES = ("STG", "UTMASTG", "RED", "REDG", "ATOMG")
SHARED = ("LDS", "LDSM", "STS", "STSM")


def base(opcode):
    """An opcode without its modifiers."""
    return opcode.partition(".")[0]


def is_matrix(opcode):
    """Whether an instruction multiplies tiles: HMMA, IMMA, QMMA, the warpgroup's HGMMA, Blackwell's UTCHMMA, others."""
    return base(opcode).endswith("MMA")


def number(instructions, names):
    """How many instructions have one of these opcodes, whatever their modifiers."""
    return sum(count for opcode, count in instructions.items() if base(opcode) in names)


def matrix(instructions):
    """The instructions that multiply tiles, with their modifiers, and how many there are of each."""
    return {opcode: count for opcode, count in instructions.items() if is_matrix(opcode)}


def parse_all(text, sizes):
    """Read a listing of kernels that lie one behind the other and have these many bytes.

    Returns:
        For each what CubinReport has of it: the spills, ``spill_in_loop``, ``instructions`` and ``loops``.
    """
    ends = list(itertools.accumulate(sizes))
    kernels = [[] for _ in sizes]
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found:
            kernels[bisect.bisect_right(ends, int(found["address"], 16))].append(found)
    return [_parsed(kernel) for kernel in kernels]


def _parsed(instructions):
    opcodes, successors = _flow(instructions)
    nest = _nest(range(len(opcodes)), successors) if opcodes else []
    cyclic = set().union(*(members for members, _ in nest))
    spills = [index for index, opcode in enumerate(opcodes) if base(opcode) in _SPILLS]
    return {
        "spill_stores": sum(base(opcodes[index]) == "STL" for index in spills),
        "spill_loads": sum(base(opcodes[index]) == "LDL" for index in spills),
        "spill_in_loop": any(index in cyclic for index in spills),
        "instructions": _counted(opcodes),
        "loops": _working(nest, opcodes),
    }


def _counted(opcodes):
    return dict(sorted(Counter(opcodes).items()))


def _flow(instructions):
    """The opcodes in order, and for each the indices of what may run next."""
    places = {int(found["address"], 16): index for index, found in enumerate(instructions)}
    successors = []
    for index, found in enumerate(instructions):
        name, operands = base(found["opcode"]), found["operands"]
        destination = _DESTINATION.search(operands) if name in _JUMPS else None
        conditional = found["guard"] is not None
        if destination:
            conditional |= name == "CALL" or "," in operands
        follows = conditional or name not in (*_JUMPS, *_ENDS)
        after = [index + 1] if follows and index + 1 < len(instructions) else []
        place = places.get(int(destination["address"], 16)) if destination else None
        successors.append(after + ([place] if place is not None else []))
    return [found["opcode"] for found in instructions], successors


def _working(nest, opcodes):
    """The loops that do the work, in the order of the code: of loops around one another the inner one.

    A loop works where it multiplies tiles, and where neither it nor a loop inside of it does, where it loads from
    global memory. Loops that wait for a barrier do neither, and count as a part of the loop around them.
    """
    bodies = [(members, depth, _counted([opcodes[index] for index in sorted(members)])) for members, depth in nest]
    found = []
    for members, depth, counts in bodies:
        inner = [other for inside, _, other in bodies if inside < members]
        works = matrix(counts) or number(counts, GLOBAL_LOADS)
        covered = any(matrix(other) or (not matrix(counts) and number(other, GLOBAL_LOADS)) for other in inner)
        if works and not covered:
            found.append((min(members), {"depth": depth, "instructions": counts}))
    return [loop for _, loop in sorted(found, key=lambda pair: pair[0])]


def main_loop(loops):
    """Of a kernel's working loops the one with most matrix instructions, then with most global loads; None of none."""
    return max(
        loops,
        key=lambda loop: (
            sum(matrix(loop["instructions"]).values()), number(loop["instructions"], GLOBAL_LOADS), loop["depth"],
        ),
        default=None,
    )  # fmt: skip


def _nest(nodes, successors):
    """Every loop as (its instructions, how many loops it stands in, with itself).

    What can reach itself is a loop; without the jumps back to where it is entered, the loops inside remain.
    """
    predecessors = [[] for _ in successors]
    for node, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(node)
    found, pending = [], [(frozenset(nodes), frozenset(), 1)]
    while pending:
        inside, cut, depth = pending.pop()
        for members in _components(inside, cut, successors, predecessors):
            entries = {node for node in members if not members.issuperset(predecessors[node])} or {min(members)}
            found.append((members, depth))
            if len(members) > 1:
                pending.append((members, cut | entries, depth + 1))
    return found


def _components(inside, cut, successors, predecessors):
    """Sets of nodes that reach one another without a way into `cut` (Kosaraju's algorithm); single nodes if cyclic."""
    finished, seen = [], set()
    for start in sorted(inside):
        _visit(start, successors, lambda node: node in inside and node not in cut, seen, finished)
    seen = set()
    for start in reversed(finished):
        # Backwards, what is cut are the ways out of the node itself.
        members = []
        _visit(start, predecessors, inside.__contains__, seen, members, cut)
        if len(members) > 1 or (start in successors[start] and start not in cut):
            yield frozenset(members)


def _visit(start, edges, allowed, seen, finished, leaves=frozenset()):
    """Depth-first from a node without recursion; appends each new node when all that it leads to is done."""
    if start in seen:
        return
    seen.add(start)
    stack = [(start, iter(() if start in leaves else edges[start]))]
    while stack:
        node, targets = stack[-1]
        fresh = next((target for target in targets if target not in seen and allowed(target)), None)
        if fresh is None:
            finished.append(node)
            stack.pop()
        else:
            seen.add(fresh)
            stack.append((fresh, iter(() if fresh in leaves else edges[fresh])))
