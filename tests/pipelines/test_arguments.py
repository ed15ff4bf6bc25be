"""A misspelt option, command or choice of any command is told with the nearest that there is."""

import pytest

from declip_ingest.failures import PASSING_REASONS
from declip_shards import DeclipError
from pipelines.arguments import ArgumentParser
from pipelines.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sources", "shwo"], "declip sources has no command 'shwo'. Did you mean 'show'"),
        (["sources", "show", "l", "--knd", "x"], "no option --knd. Did you mean '--kind'"),
        (["sources", "show", "l", "--knd=x"], "no option --knd. Did you mean '--kind'"),
        (["sources", "show", "l", "--kind", "cc12n"], "--kind is 'cc12n'. Did you mean 'cc12m'"),
        (["sources", "show", "l", "--rows", "x"], "--rows: invalid int value: 'x'; see"),
        (["sources", "diff", "l"], "the following arguments are required: B; see"),
        (["sources"], "the following arguments are required: COMMAND; see declip sources --help."),
        (["sources", "--jsn", "show"], "no option --jsn."),
        (["refetch", "--raeson", "timeout"], "no option --raeson. Did you mean '--reason'"),
        (["refetch", "--reaso", "timeout"], "no option --reaso. Did you mean '--reason'"),
        (["refetch", "--out", "x"], "required: --reason; see declip refetch --help."),
        (["doctor", "ingst", "--out", "x"], "WHAT is 'ingst'. Did you mean 'ingest'"),
        (["doctor", "ingest", "--ot", "x"], "no option --ot. Did you mean '--out'"),
        (["doctor", "ingest", "more", "--out", "x"], "unrecognized arguments: more; see"),
        (["optout", "l", "--out", "x", "--dryrun"], "Did you mean '--dry-run'"),
        (["convert", "f", "--target", "t", "--too", "files"], "Did you mean '--to'"),
        (["convert", "f", "--to", "files", "--target"], "--target: expected one argument; see"),
    ],
)
def test_wrong_usage_is_one_sentence_with_the_nearest_name(capsys, arguments, said):
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.startswith("declip: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="toy")
    made.add_argument("--word", "-w")
    made.add_argument("words", nargs="*")
    return made


def test_what_is_right_is_read_as_argparse_reads_it():
    for given in (["--word", "x", "a"], ["--word=x", "a"], ["-w", "x", "a"], ["a", "--word", "x"]):
        found = parser().parse_args(given)
        assert (found.word, found.words) == ("x", ["a"])
    assert parser().parse_args(["--", "--wrod"]).words == ["--wrod"]
    assert parser().parse_args(["-"]).words == ["-"]


def test_commands_read_their_own_options_and_values():
    made = ArgumentParser(prog="toy")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("go").add_argument("--far", action="store_true")
    assert made.parse_args(["go", "--far"]).far
    with pytest.raises(DeclipError, match=r"no option --fr\. Did you mean '--far'"):
        made.parse_args(["go", "--fr"])


def test_help_still_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["refetch", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out.split("\n  passing ")[1].split("\n\n")[0]
    assert set(said.replace(",", " ").split()) == PASSING_REASONS, "and none that is not taken"
