"""Read nvdisasm's listing of a kernel: its instructions, its loops, and where registers are spilled."""

import re
from collections import Counter

_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_LABEL = re.compile(r"^(?P<label>\.L_\w+|[\w.$]+):\s*$")
_TARGET_LABEL = re.compile(r"`\((?P<label>[^)]+)\)")
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


def parse(text):
    """Read a listing.

    Returns:
        What CubinReport has of it: the spills, ``spill_in_loop``, ``instructions`` and ``loops``.
    """
    opcodes, successors = _flow(text)
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


def _flow(text):
    """The opcodes in order, and for each the indices of what may run next."""
    opcodes, jumps, labels = [], {}, {}
    follows = []  # whether control may go on to the next instruction
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label["label"]] = len(opcodes)
            continue
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name = base(found["opcode"])
        destination = _TARGET_LABEL.search(found["operands"])
        conditional = found["guard"] is not None
        if name in _JUMPS and destination:
            jumps[len(opcodes)] = destination["label"]
            conditional |= name == "CALL" or "," in found["operands"]
        follows.append(conditional or name not in (*_JUMPS, *_ENDS))
        opcodes.append(found["opcode"])
    successors = [[index + 1] if goes_on and index + 1 < len(opcodes) else [] for index, goes_on in enumerate(follows)]
    for index, label in jumps.items():
        if labels.get(label, len(opcodes)) < len(opcodes):
            successors[index].append(labels[label])
    return opcodes, successors


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
