"""What tests of commands share."""

from fusedops import cli


def run(capsys, *arguments):
    """Exit status, stdout and stderr of one command."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        status = leaving.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
