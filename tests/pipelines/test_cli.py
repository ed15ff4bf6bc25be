"""The command as a person meets it: help, misspelt words, folders that will not do, bad tables."""

import io
import os
import re
import socket
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_demo

from declip_shards import DeclipError, Store
from pipelines import cli, recipes
from pipelines.lock import workspace_lock
from pipelines.options import options_of
from pipelines.runner import check_location

CAPTIONS = ["a red square", "a blue circle"]
RUN_FLAGS = ("--only", "--from", "--until", "--runner", "--dry-run", "--num-samples")
URLS = ["http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9/b.jpg"]


@pytest.fixture
def declip(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder: (status, standard output, standard error)."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*words):
        try:
            status = cli.main(list(words))
        except SystemExit as stop:  # argparse, for --help and --version
            status = int(str(stop.code))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def refused(result, *parts):
    """Status 1 and one sentence, without a traceback, that has all the parts."""
    status, _, err = result
    assert status == 1
    assert err.startswith("declip: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def test_help_names_the_commands_and_recipes(declip):
    status, out, _ = declip("--help")
    assert status == 0
    for word in ("run", "status", *recipes.RECIPES):
        assert re.search(rf"^\s+{word}\s+\S", out, re.MULTILINE)
    assert declip("--version")[1].startswith("opendeclip ")


@pytest.mark.parametrize("recipe", sorted(recipes.RECIPES))
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_recipe_has_a_line_and_a_default_for_every_option(declip, command, recipe):
    status, out, _ = declip(command, recipe, "--help")
    assert status == 0
    assert recipes.describe(recipe) in out
    lines = out.partition(f"settings of {recipe} ")[2].splitlines()
    options = options_of(recipes.build(recipe, "runs"))
    assert len(options) > (4 if recipe == "repack" else 50)
    for option in options:
        assert option.help.endswith("."), option.flag
        assert len(option.help) > 5, option.flag
        here = next(n for n, line in enumerate(lines) if line.split()[:1] == [option.flag])
        text = " ".join(line.strip() for line in lines[here + 1 : here + 5])
        assert text.startswith(option.help), option.flag
        assert "(default: " in text, option.flag
    for flag in {"run": RUN_FLAGS}.get(command, ()):
        assert re.search(rf"^  {flag}( \S+)?(  +|\n {{20,}})\S", out, re.MULTILINE), flag


def test_a_reader_that_goes_early_is_no_error(monkeypatch, capsys):
    for arguments in (["run", "demo", "--help"], ["index", "--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stdout:
            monkeypatch.setattr("sys.stdout", stdout)
            assert cli.main(arguments) == 141
            stdout.write("what is printed after that goes nowhere")
        assert capsys.readouterr().err == ""


def test_a_terminal_that_lacks_a_letter_gets_its_number(monkeypatch, tmp_path):
    (tmp_path / "list.csv").write_text("url,caption\nhttp://a/b.jpg,Grün\n", encoding="utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    assert cli.main(["sources", "show", str(tmp_path / "list.csv")]) == 0
    assert b"Gr\\xfcn" in stdout.buffer.getvalue()


def test_without_a_recipe_the_help_is_shown_and_the_status_is_wrong_usage(declip):
    status, out, _ = declip("run")
    assert status == 2
    assert "demo" in out
    status, _, err = declip()
    assert status == 2
    assert "COMMAND" in err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("rnu demo", ["no command 'rnu'", "Did you mean 'run'"]),
        ("run dmeo", ["no recipe 'dmeo'", "Did you mean 'demo'"]),
        ("status dmeo", ["no recipe 'dmeo'", "Did you mean 'demo'"]),
        ("run demo --only tran", ["no stage 'tran'", "Did you mean 'train'"]),
        ("run demo --from fliter", ["no stage 'fliter'", "Did you mean 'filter'"]),
        ("run demo --until idnex", ["no stage 'idnex'", "Did you mean 'index'"]),
        ("run demo --only train --from filter", ["leave out --from"]),
        ("run demo --from train --until filter", ["--from train comes after --until filter"]),
        ("run demo --onyl train", ["no option --onyl", "Did you mean '--only'"]),
        ("run demo --runner rey", ["--runner is 'rey'", "Did you mean 'ray'"]),
        ("run demo --filter.min-wrods 3", ["Did you mean '--filter.min-words'"]),
        ("run demo --filter.min-words few", ["'few', which is not a whole number"]),
        ("run demo --filter.min-words -3", ["min_words is -3", "at least 0"]),
        ("run demo --filter.min-words", ["--filter.min-words needs a value"]),
        ("run demo --ingest.resize-mode boder", ["Did you mean 'border'"]),
        ("run demo --train.eda perhaps", ["true or false"]),
        ("run demo --train.model ViT-Ti-8-84", ["Did you mean 'ViT-Ti-8-48'"]),
        ("run demo --index.recall-target 2", ["recall_target is 2"]),
        ("run demo --prepare.port 70000", ["port is 70000", "--prepare.port"]),
        ("run demo --eval.templates simpel", ["simpel", "simple"]),
        ("run demo --report.num-examples 0", ["num_examples is 0", "between 1 and 200"]),
        ("run demo stray", ["'stray' is not an option"]),
        ("run demo --dry-rnu", ["no option --dry-rnu", "Did you mean '--dry-run'"]),
        ("run demo --num-samples 9", ["--num-samples 9", "--dry-run"]),
        ("run demo --dry-run --num-samples 0", ["--num-samples is 0", "at least 1"]),
        ("run demo --dry-run --num-samples many", ["'many', which is not a whole number"]),
        ("run demo --dry-run --runner rey", ["--runner is 'rey'", "Did you mean 'ray'"]),
        ("run demo --dry-run --only tran", ["no stage 'tran'", "Did you mean 'train'"]),
        ("run yfcc15m_v2_declip_vit_b_32", ["Did you mean 'yfcc15m-v2-declip-vit-b-32'"]),
        ("run cc3m-declip-rn50", ["no list is named", "--sources.lists FILE"]),
        ("run pairs", ["no list is named", "--sources.lists FILE"]),
        ("run pairs --sources.lists gone.tsv", ["gone.tsv"]),
        ("run pairs --ingest.table gone.tsv", ["gone.tsv' does not exist", "--ingest.table"]),
        ("run pairs --ingest.table a --sources.kind coyo", ["--sources.kind", "exclude"]),
        ("run pairs --sources.kind laoin", ["'laoin'", "Did you mean 'laion'"]),
        ("refetch --out runs/none --reason timout", ["'timout'", "'timeout'"]),
        ("run demo --out=", ["--out is empty"]),
        ("run demo --out nowhere://x", ["'nowhere://x'", "another --out"]),
    ],
)
def test_a_wrong_word_is_one_sentence_and_writes_nothing(declip, words, parts):
    refused(declip(*words.split()), *parts)
    assert os.listdir(".") == []


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_an_output_folder_that_is_a_file_or_lies_in_one_is_refused(declip, tmp_path, command):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    refused(declip(command, "demo", "--out", str(file)), f"{str(file)!r} is a file")
    inside = str(file / "x")
    refused(declip(command, "demo", "--out", inside), f"{inside!r} lies in", "is a file")
    assert file.read_text() == "mine"


def test_an_output_folder_that_cannot_be_written_is_refused(declip):
    # /proc takes no files from anybody, root included.
    refused(declip("run", "demo", "--out", "/proc/declip"), "cannot write", "'/proc/declip'")


def test_a_folder_to_be_made_is_a_good_location(tmp_path):
    check_location(str(tmp_path / "a" / "b"))
    check_location("memory://anything")
    with pytest.raises(DeclipError, match="empty"):
        check_location("")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_by_another_run_is_refused(declip, tmp_path):
    out = tmp_path / "out"
    with workspace_lock(Store(str(out))):
        result = declip("run", "demo", "--out", str(out))
    refused(result, f"process {os.getpid()}", "wait for it, stop it, or choose another --out")


def test_status_is_a_table_with_a_reason_for_every_stage(declip, tmp_path):
    out = tmp_path / "out"
    status, text, _ = declip("status", "demo", "--out", str(out))
    assert status == 0
    rows = [line.split(maxsplit=5) for line in text.splitlines()[2:]]
    assert rows[0][:5] == ["stage", "state", "in", "out", "seconds"]
    idle = {"embed_all", "score", "cluster"}  # nothing asks for them
    names = [name for name in recipes.build("demo", "x").names() if name not in idle]
    assert [row[0] for row in rows[1:]] == names
    assert {tuple(row[1:]) for row in rows[1:]} == {("new", "-", "-", "-", "never finished")}
    assert not out.exists()  # asking changes nothing


def test_help_and_status_load_nothing_heavy(tmp_path):
    for words in (["--help"], ["run", "demo", "--help"], ["status", "demo", "--out", "x"]):
        code = (
            "import sys; from pipelines.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "print('loaded', *sys.modules)"
        )
        text = subprocess.run(
            [sys.executable, "-c", code, *words],
            env=tiny_demo.environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        loaded = set(text.rpartition("loaded ")[2].split())
        heavy = {"torch", "ray", "faiss", "sklearn", "scipy", "transformers", "deepspeed", "cv2"}
        assert "pipelines.recipes" in loaded
        assert not loaded & heavy


def write_table(path, columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"url": URLS, "captions": CAPTIONS}, ["no column 'caption'", "Did you mean 'captions'"]),
        ({"link": URLS, "caption": CAPTIONS}, ["no column 'url'", "caption, link"]),
        ({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}, ["no rows"]),
        ({"url": URLS, "caption": [3, 4]}, ["column 'caption'", "must hold text", "row 0", "3"]),
        ({"url": [1.5, 2.5], "caption": CAPTIONS}, ["column 'url'", "must hold text"]),
        ({"url": URLS, "caption": CAPTIONS, "key": ["a", "b"]}, ["column 'key'", "rename it"]),
        ({"url": URLS, "caption": CAPTIONS, "x": [b"1", b"2"]}, ["column 'x'", "binary"]),
    ],
)
def test_a_bad_table_is_one_sentence_and_nothing_half_written(declip, tmp_path, columns, parts):
    table = write_table(tmp_path / "pairs.parquet", columns)
    out = tmp_path / "out"
    refused(declip("run", "pairs", "--out", str(out), "--ingest.table", table), table, *parts)
    assert [p.name for p in out.rglob("*") if p.is_file()] in ([], ["lock", "tasks.lock"])


@pytest.mark.parametrize(("name", "data"), [("pairs.csv", b""), ("pairs.parquet", b"no parquet")])
def test_a_table_that_is_none_is_one_sentence(declip, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    table = str(tmp_path / name)
    refused(declip("run", "pairs", "--out", str(tmp_path / "out"), "--ingest.table", table), table)


def test_a_bad_table_leaves_the_results_of_a_good_one_alone(declip, tmp_path):
    table, out = tmp_path / "pairs.parquet", tmp_path / "out"
    words = ["run", "pairs", "--out", str(out), "--runner", "local", "--until", "ingest"]
    words += ["--ingest.table", write_table(table, {"url": URLS, "caption": CAPTIONS})]
    words += ["--ingest.retries", "0"]
    status, text, _ = declip(*words)
    assert status == 0
    assert "ingest: 2 in, 0 out" in text  # nobody listens there: named failures, not an error
    before = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    write_table(table, {"url": URLS, "text": CAPTIONS})
    refused(declip(*words), "no column 'caption'")
    after = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    assert after == before


def test_a_port_in_use_is_one_sentence_that_names_the_setting(tmp_path):
    port = tiny_demo.free_port()
    with socket.create_server(("127.0.0.1", port)):
        ended = tiny_demo.run_tiny(
            tmp_path / "fakes", tmp_path / "out", "--until", "ingest", port=port
        )
    assert ended.returncode == 1
    assert "prepare: 156 in, 156 out" in ended.stdout
    (sentence,) = [line for line in ended.stderr.splitlines() if line.startswith("declip: ")]
    assert f"port {port}" in sentence
    assert "--prepare.port" in sentence
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out" / "shards").exists()
