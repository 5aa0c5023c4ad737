"""Look after the tuned configurations: show, export, import, merge, verify, prune, clear."""

import json

from fusedops.cli.console import CommandError, Console, check_output, first_line


def add_arguments(parser):
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    show = actions.add_parser("show", help="every entry, where it is and what it holds")
    show.add_argument("--op", help="of one kernel alone")
    show.add_argument("--json", action="store_true", help="print JSON")
    actions.add_parser("export", help="write the user's entries to one file").add_argument("file")
    actions.add_parser("import", help="add the entries of an exported file, each checked").add_argument("file")
    merge = actions.add_parser("merge", help="add the entries of other cache directories or exported files")
    merge.add_argument("source", nargs="+")
    actions.add_parser("verify", help="check every entry; exit status 1 where one cannot be used")
    prune = actions.add_parser("prune", help="remove what interrupted writers left and what was moved aside")
    prune.add_argument("--days", type=float, help="also entries that are older")
    prune.add_argument("--other-environments", action="store_true", help="also entries of other devices and versions")
    actions.add_parser("clear", help="remove the user's entries").add_argument("--op", help="of one kernel alone")


def run(args):
    """Run the command."""
    from fusedops._core.tuning.entry import InvalidEntry

    try:
        return {
            "show": _show, "export": _export, "import": _import, "merge": _merge, "verify": _verify, "prune": _prune,
            "clear": _clear,
        }[args.action](args)  # fmt: skip
    except (InvalidEntry, OSError) as error:
        raise CommandError(first_line(error)) from error


def _show(args):
    from fusedops._core.tuning.store import current_store

    found = [
        (layer, entry)
        for layer in current_store().layers
        for entry in layer.entries()
        if args.op is None or entry.key["op"] == args.op
    ]
    if args.json:
        print(json.dumps([{"layer": layer.name, **entry.as_dict()} for layer, entry in found], indent=2))
        return 0
    console = Console()
    for layer in current_store().layers:
        console.line(f"{layer.name:<6} {layer.root if layer.root is not None else 'none: kept in memory only'}")
    if found:
        header = ("kernel", "configuration", "sizes", "flags", "gpu", "layer", "measured", "date")
        console.table(f"{len(found)} tuned configurations", header, [_row(*pair) for pair in found])
    return 0


def _row(layer, entry):
    def joined(values):
        return " ".join(f"{name}={value}" for name, value in values.items())

    key = entry.key
    measured = f"{len(entry.timings)}{'' if entry.complete else ' (unfinished)'}"
    return (key["op"], joined(entry.config), joined(key["sizes"]), joined(key["flags"]), key["environment"].get("gpu"),
            layer.name, measured, entry.date)  # fmt: skip


def _export(args):
    from fusedops._core.tuning.store import current_store
    from fusedops.tuning import upkeep

    check_output(args.file)
    entries = current_store().user.entries()
    upkeep.export(args.file, entries)
    Console().line(f"{len(entries)} entries written to {args.file}")
    return 0


def _import(args):
    return _added([args.file])


def _merge(args):
    return _added(args.source)


def _added(sources):
    """Read all sources before anything is put; status 1 where an entry was refused."""
    from fusedops._core.tuning.store import merged
    from fusedops.tuning import upkeep

    console, collections, refused = Console(), [], []
    for source in sources:
        try:
            entries, reasons = upkeep.collected(source)
        except ValueError as error:
            raise CommandError(f"{source} {error}") from error
        collections.append(entries)
        refused += [f"{source}: {reason}" for reason in reasons]
    for reason in refused:
        console.line(f"refused: {reason}")
    entries = merged(*collections)
    console.line(f"{upkeep.add(entries)} of {len(entries)} entries were new or rank above what was there")
    return int(bool(refused))


def _verify(args):
    from fusedops.tuning import upkeep

    found = upkeep.verify()
    console = Console()
    for layer, path, reason in found:
        console.line(f"{layer}: {path} {reason}")
    console.line(f"{len(found)} entries cannot be used" if found else "Every entry can be used.")
    return int(any(reason != upkeep.STALE for _, _, reason in found))


def _prune(args):
    from fusedops.tuning import upkeep

    Console().line(f"{upkeep.prune(args.days, args.other_environments)} files removed")
    return 0


def _clear(args):
    from fusedops.tuning import upkeep

    Console().line(f"{upkeep.clear(args.op)} files removed")
    return 0
