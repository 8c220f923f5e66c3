"""load_config and dump_toml: files, extends, overrides, and what the user is told about mistakes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from torchtitan.config import JobConfig, data_schema, dump_toml, load_config
from torchtitan.config import schema as job_config
from torchtitan.config.checks import check_ranges
from torchtitan.config.keys import Decision, element_table, keys_of
from torchtitan.config.toml_file import explain, known_keys, tomllib, torchtitan_keys
from torchtitan.tools.errors import UserError


def write(folder: Path, **files: str) -> Path:
    """Write `name.toml` for each keyword; return the path of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, *overrides: str) -> JobConfig:
    return load_config(["--job.config_file", str(path), *overrides])


def error_of(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config([*([] if path is None else ["--job.config_file", str(path)]), *overrides])
    message = str(caught.value)
    assert "\n" not in message, "an error is one paragraph"
    return message


def other_value(hint: Any, default: Any) -> Any:
    """A value of the type `hint` that is not `default`, for a round trip that would notice a lost key."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return next((a for a in arguments if a != default), default)
    if element_table(hint) is job_config.Gate:
        return (job_config.Gate(metric="loss", at_most=3.5), job_config.Gate(metric="loss_by_position.64", over=2))
    if element_table(hint) is data_schema.Point:
        return (data_schema.Point(3, 0.5, (0.25, 0.75)), data_schema.Point(step=70, weight=2.0))
    if element_table(hint):
        return tuple(
            data_schema.Source(
                name=f'a "{i}" \\ é\n',
                path=f"data/{i}/*.jsonl",
                weight=0.1 + i,
                length_bins=(5, 7 + i),
                schedule=(data_schema.Point(3, None, (0.2, 0.3, 0.5)), data_schema.Point(9, 1.0 + i))[: i + 1],
            )
            for i in range(2)
        )
    if get_origin(hint) is tuple:
        of = arguments[0]
        if get_origin(of) is Literal:
            return get_args(of)[:1]
        return {float: (0.5, 2.0), int: (3, 70), str: ("*norm*", "layers.0.*")}[of]
    kind = hint if isinstance(hint, type) else next(a for a in arguments if a is not type(None))
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    if kind is str:
        return 'x "y" \\ ü'
    return not default if kind is bool else (default or 0) + (3 if kind is int else 1 / 3)


def changed_config() -> JobConfig:
    """Every key of the schema at another value than its default."""
    tables = {}
    for table, default in vars(JobConfig()).items():
        keys = keys_of(type(default)).items()
        values = {name: other_value(key.hint, getattr(default, name)) for name, key in keys}
        tables[table] = type(default)(**values)
    config = JobConfig(**tables)
    return dataclasses.replace(config, job=dataclasses.replace(config.job, config_file=None, print_config=False))


# --- files -----------------------------------------------------------------------------------------------------------


def test_without_a_file_the_defaults_hold() -> None:
    config = load_config([])
    assert dataclasses.replace(config, stage=JobConfig().stage) == JobConfig()


@pytest.mark.parametrize("spelling", ["--job.config_file X", "--job.config_file=X", "--job.config-file X"])
def test_every_spelling_of_the_flag_reads_the_file(tmp_path: Path, spelling: str) -> None:
    path = write(tmp_path, mine="[training]\nsteps = 7\n")
    config = load_config(spelling.replace("X", str(path)).split(" "))
    assert (config.training.steps, config.stage.name, config.job.config_file) == (7, "mine", str(path))


def test_the_name_of_a_stage_is_the_file_unless_given(tmp_path: Path) -> None:
    assert load(write(tmp_path, a='[stage]\nname = "long"\n')).stage.name == "long"
    assert load(write(tmp_path, b="")).stage.name == "b"


@pytest.mark.parametrize("make", [changed_config, JobConfig])
def test_dumping_and_loading_gives_the_same_configuration(tmp_path: Path, make: Any) -> None:
    config = make()
    config = dataclasses.replace(config, stage=job_config.Stage(name="s"))
    again = load(write(tmp_path, dumped=dump_toml(config)))
    assert dataclasses.replace(again, job=dataclasses.replace(again.job, config_file=None)) == config


def test_what_load_config_returns_survives_a_dump_without_a_file(tmp_path: Path) -> None:
    config = load_config(["--job.print_config"])
    again = load(write(tmp_path, config=dump_toml(config)))
    assert dataclasses.replace(again, job=config.job) == config


def test_the_dump_leaves_out_how_the_run_was_started_and_what_is_unset(tmp_path: Path) -> None:
    text = dump_toml(load(write(tmp_path, a=""), "--job.print_config"))
    for absent in ("config_file", "print_config", "peak_tflops", "global_batch_size", "None"):
        assert absent not in text


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path, stage='[job]\ndump_folder = "~/out"\n[stage]\nafter_dump_folder = "~/before"\n')
    config = load_config(["--job.config_file", str(file), "--model.hf_assets_path", "~/assets"])
    assert config.model.hf_assets_path == f"{tmp_path}/assets"
    assert (config.job.dump_folder, config.stage.after_dump_folder) == (f"{tmp_path}/out", f"{tmp_path}/before")


@pytest.mark.parametrize("digits", [19, 400])
def test_numbers_that_no_machine_holds(digits: int, tmp_path: Path) -> None:
    for key in ("training.seq_len", "training.seed", "rope.theta", "optimizer.lr", "training.global_batch_tokens"):
        table, name = key.split(".")
        file = write(tmp_path, stage=f"[{table}]\n{name} = {'9' * digits}\n")
        if digits == 400 or name not in ("theta", "lr"):
            with pytest.raises(UserError, match=f"{key} "):
                check_ranges(load_config(["--job.config_file", str(file)]))


def test_an_integer_will_do_for_a_number(tmp_path: Path) -> None:
    lr = load(write(tmp_path, a="[optimizer]\nlr = 1\n")).optimizer.lr
    assert lr == 1.0 and type(lr) is float


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "nowhere.toml does not exist" in error_of(tmp_path / "nowhere.toml")
    assert "cannot be read" in error_of(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[job]\ndescription = "\xe9"\n')
    assert "latin.toml cannot be read as UTF-8" in error_of(tmp_path / "latin.toml")
    assert "needs the name of a TOML file" in error_of(None, "--job.config_file")
    assert "needs the name of a TOML file" in error_of(None, "--job.config_file", "--training.steps", "3")


def test_broken_syntax_names_file_and_position(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, broken="[training]\nsteps = = 3\n"))
    assert "broken.toml is not valid TOML" in message and "line 2, column 9" in message


# --- extends ---------------------------------------------------------------------------------------------------------


def test_extends_merges_tables_by_key_and_replaces_arrays(tmp_path: Path) -> None:
    source = '[[data.sources]]\nname = "{0}"\npath = "{0}"\n'
    write(tmp_path / "base", root="[training]\nseq_len = 64\nsteps = 5\n" + source.format("a") + source.format("b"))
    write(tmp_path, middle='extends = "base/root.toml"\n[training]\nsteps = 6\nseed = 9\n')
    config = load(write(tmp_path / "x", leaf='extends = "../middle.toml"\n[training]\nseed = 1\n' + source.format("c")))
    assert (config.training.seq_len, config.training.steps, config.training.seed) == (64, 6, 1)
    assert [s.name for s in config.data.sources] == ["c"]
    assert config.stage.name == "leaf"


def test_extends_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "t", a="[training]\nsteps = 5\n", b='extends = "a.toml"\n')
    monkeypatch.chdir(tmp_path)
    assert load(Path("t/b.toml")).training.steps == 5


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_cycle_names_its_chain(tmp_path: Path, length: int) -> None:
    for i in range(length):
        write(tmp_path, **{f"f{i}": f'extends = "f{(i + 1) % length}.toml"\n'})
    message = error_of(tmp_path / "f0.toml")
    files = [*range(length), 0]
    assert " -> ".join(str(tmp_path / f"f{i}.toml") for i in files) in message


def test_two_files_may_extend_the_same_one(tmp_path: Path) -> None:
    write(tmp_path, a="[training]\nsteps = 5\n")
    for name in ("b", "c"):
        assert load(write(tmp_path, **{name: 'extends = "a.toml"\n'})).training.steps == 5


def test_a_missing_parent_names_who_extends_it(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, child='extends = "gone.toml"\n'))
    assert "child.toml extends" in message and "gone.toml, which does not exist" in message


@pytest.mark.parametrize("value", ["3", '["a.toml"]', '""'])
def test_extends_must_name_a_file(tmp_path: Path, value: str) -> None:
    assert "is not a file name" in error_of(write(tmp_path, a=f"extends = {value}\n"))


# --- unknown names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("[training]\nsteps = 3\nseqlen = 4\n", 3, "training.seqlen is not known; did you mean training.seq_len?"),
        ("\n[traning]\nsteps = 3\n", 2, "[traning] is not a table of the configuration; did you mean training?"),
        ("[optimizer]\nseq_len = 4\n", 2, "did you mean training.seq_len?"),
        ("steps = 4\n", 1, "steps stands outside the tables of the configuration; did you mean training.steps?"),
        ("[rope]\nzzz = 4\n", 2, "the keys of [rope] are theta"),
        ("[zzz]\n", 1, "the tables are job, profiling"),
        ('[data]\nadd_bos = true\n[[data.sources]]\nnaem = "a"\n', 3, "did you mean name?"),
    ],
)
def test_an_unknown_name_is_placed_and_the_nearest_offered(tmp_path: Path, text: str, line: int, expected: str) -> None:
    message = error_of(write(tmp_path, mine=text))
    assert f"mine.toml:{line}: " in message and expected in message


def test_the_error_names_the_file_where_the_mistake_stands(tmp_path: Path) -> None:
    write(tmp_path, parent="[training]\nstep = 3\n")
    message = error_of(write(tmp_path, child='extends = "parent.toml"\n[training]\nsteps = 3\n'))
    assert "parent.toml:2: training.step is not known" in message and "child" not in message


@pytest.mark.parametrize("name", [name for name in known_keys() if name not in ("data.sources", "stage.gates")])
def test_a_slip_in_any_name_is_put_right(name: str) -> None:
    table, _, key = name.partition(".")
    assert f"did you mean --{name}?" in error_of(None, f"--{table}.{key[0]}{key}", "1")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("parallelism.pipeline_parallel_degree", "pipeline parallelism is not offered"),
        ("parallelism.pipeline_parallel_schedule", "FSDP2"),
        ("parallelism.expert_parallel_degree", "expert parallelism is not offered"),
        ("training.dataset", "[[data.sources]]"),
        ("training.dataset_path", "[[data.sources]]"),
        ("training.batch_size", "training.local_batch_size"),
        ("model.name", "model.flavor"),
        ("model.tokenizer_path", "model.hf_assets_path"),
        ("checkpoint.enable_checkpoint", "checkpoint.enable"),
        ("experimental.pipeline_parallel_degree", "pipeline parallelism is not offered"),
        ("float8.enable_fsdp_float8_all_gather", "[quantize]"),
    ],
)
def test_keys_of_torchtitan_are_explained_in_files_and_on_the_command_line(
    tmp_path: Path, name: str, expected: str
) -> None:
    table, _, key = name.partition(".")
    in_file = error_of(write(tmp_path, a=f"[{table}]\n{key} = 2\n"))
    for message in (in_file, error_of(None, f"--{name}", "2"), error_of(None, f"--{name.replace('_', '-')}=2")):
        assert expected in message and "did you mean" not in message
    assert "a.toml:" in in_file


def test_no_explanation_stands_in_the_way_of_a_key_that_exists() -> None:
    assert [name for name in [*known_keys(), *keys_of(JobConfig)] if explain(name)] == []
    tables = torchtitan_keys()
    for text in [*tables["renamed"].values(), *map(explain, patterns(tables["gone"]))]:
        assert text and "\n" not in text and not text.endswith(".")


def patterns(gone: dict[str, str]) -> list[str]:
    return [pattern.replace("*", "x") for line in gone for pattern in line.split()]


def test_every_explanation_is_heard_and_names_keys_that_exist() -> None:
    """None stands behind another that speaks first; a new name is a key of the schema."""
    tables = torchtitan_keys()
    for line, text in tables["gone"].items():
        for name in patterns({line: text}):
            assert explain(name) == " ".join(text.split()), name
    for new in tables["renamed"].values():
        assert re.split("[ :]", new)[0] in known_keys(), new


def test_an_installed_package_has_its_data_files() -> None:
    """Every file of the package that is not Python's is named in pyproject.toml."""
    root = Path(job_config.__file__).parents[1]
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    named = {
        path for pattern in project["tool"]["setuptools"]["package-data"]["torchtitan"] for path in root.glob(pattern)
    }
    others = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others <= named and root / "config/torchtitan_keys.toml" in named


# --- wrong values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training.steps", '"20"'),
        ("training.steps", "true"),
        ("training.steps", "20.0"),
        ("training.global_batch_size", '"4"'),
        ("training.deterministic", "1"),
        ("training.deterministic", '"true"'),
        ("optimizer.lr", '"1e-3"'),
        ("optimizer.lr", "true"),
        ("metrics.peak_tflops", "false"),
        ("job.dump_folder", "3"),
        ("optimizer.no_decay", '"*norm*"'),
        ("optimizer.no_decay", "[1]"),
        ("rope.theta", "[1.0]"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, name: str, value: str) -> None:
    table, _, key = name.partition(".")
    message = error_of(write(tmp_path, wrong=f"[{table}]\n{key} = {value}\n"))
    assert "wrong.toml:2: " in message and name in message and "is expected" in message
    assert value.strip("[]") in message


@pytest.mark.parametrize("value", ['"flexx"', "3", "true"])
def test_a_bad_choice_lists_the_choices(tmp_path: Path, value: str) -> None:
    message = error_of(write(tmp_path, a=f"[model]\nattention_backend = {value}\n"))
    assert f"a.toml:2: model.attention_backend = {value}" in message
    hint = known_keys()["model.attention_backend"].hint
    assert all(f'"{choice}"' in message for choice in get_args(hint))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training = 3\n", "write [training]"),
        ("[[training]]\nsteps = 3\n", "write [training]"),
        ('[data.sources]\nname = "a"\n', "write [[data.sources]]"),
        ('[data]\nsources = ["a"]\n', "write [[data.sources]]"),
        ('[[data.sources]]\nweight = "2"\n', 'data.sources[0].weight = "2"'),
        ('[job]\nconfig_file = "a.toml"\n', "extends"),
    ],
)
def test_wrong_shapes(tmp_path: Path, text: str, expected: str) -> None:
    message = error_of(write(tmp_path, a=text))
    assert expected in message and "a.toml:" in message


# --- command line ----------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, a="[training]\nsteps = 5\nseq_len = 64\nglobal_batch_size = 8\n")
    config = load(
        path, "--training.steps", "20", "--training.global_batch_size", "None", "--optimizer.no-decay", "a", "b"
    )
    assert (config.training.steps, config.training.seq_len, config.training.global_batch_size) == (20, 64, None)
    assert config.optimizer.no_decay == ("a", "b")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--checkpoint.enable", True),
        ("--checkpoint.no_enable", False),
        ("--checkpoint.no-enable", False),
        ("--checkpoint.enable false", False),
        ("--checkpoint.enable=False", False),
        ("--checkpoint.enable True", True),
        ("--checkpoint.no_enable false", True),
    ],
)
def test_every_way_to_throw_a_switch(flags: str, expected: bool) -> None:
    assert load_config([*flags.split(), "--training.steps", "3"]).checkpoint.enable is expected


def test_one_source_can_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, a='[[data.sources]]\nname = "x"\npath = "p"\n[[data.sources]]\nname = "y"\npath = "q"\n')
    config = load(path, "--data.sources.0.weight", "2", "--data.sources.1.path=r")
    assert [(s.name, s.path, s.weight) for s in config.data.sources] == [("x", "p", 2.0), ("y", "r", 1.0)]
    assert "N = 0 to 1" in error_of(path, "--data.sources.2.weight", "2")
    assert "there is no [[data.sources]]" in error_of(None, "--data.sources.0.weight", "2")


def test_a_point_of_a_schedule_is_written_and_overridden(tmp_path: Path) -> None:
    """As inline tables or as an array of tables; an override names a point by its number."""
    inline = "schedule = [{step = 0, weight = 1}, {step = 10, weight = 2.5, length_shares = [0.25, 0.75]}]\n"
    tables = (
        "[[data.sources.schedule]]\nstep = 0\nweight = 1\n"
        "[[data.sources.schedule]]\nstep = 10\nweight = 2.5\nlength_shares = [0.25, 0.75]\n"
    )
    for text in (inline, tables):
        path = write(tmp_path, a='[[data.sources]]\nname = "x"\npath = "p"\n' + text)
        points = data_schema.Point(0, 1.0), data_schema.Point(10, 2.5, (0.25, 0.75))
        assert load(path).data.sources[0].schedule == points
        flag = "--data.sources.0.schedule.1."
        config = load(path, f"{flag}weight=4", f"{flag}length_shares", "1", "0")
        assert config.data.sources[0].schedule == (points[0], data_schema.Point(10, 4.0, (1.0, 0.0)))
        assert load_config([f"--job.config_file={write(tmp_path, b=dump_toml(config))}"]).data == config.data
        assert f"did you mean {flag}weight?" in error_of(path, f"{flag}weigt", "2")
    path = write(tmp_path, a='[[data.sources]]\nname = "x"\n[[data.sources.schedule]]\nsteps = 3\n')
    words = "steps is not a key of [[data.sources[0].schedule]] (number 0 of them, from 0); did you mean step?"
    assert words in error_of(path)
    path = write(tmp_path, a='[[data.sources]]\nname = "x"\nschedule = [[0, 1.0]]\n')
    assert "data.sources[0].schedule is an array of tables" in error_of(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--training.stps", "4"], "did you mean --training.steps?"),
        (["--steps=4"], "did you mean --training.steps?"),
        (["--optimiser.lr", "1"], "did you mean --optimizer.lr?"),
        (["--training.steps", "x"], "--training.steps"),
        (["--training.steps", "2.5"], "2.5"),
        (["--training.steps"], "--training.steps"),
        (["--model.attention_backend", "flexx"], "'sdpa', 'dense'"),
        (["--checkpoint.enable=perhaps"], "true or false"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in error_of(None, *arguments)
    assert capsys.readouterr() == ("", ""), "main prints the error, nobody else"


def docstrings() -> dict[str, dict[str, str]]:
    """Class name -> field -> the string under it in schema.py and data_schema.py."""
    result: dict[str, dict[str, str]] = {}
    for node in [node for module in (job_config, data_schema) for node in ast.parse(inspect.getsource(module)).body]:
        if isinstance(node, ast.ClassDef) and node.name != "JobConfig":
            result[node.name] = {}
            for item, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    text = following.value if isinstance(following, ast.Expr) else None
                    documented = isinstance(text, ast.Constant) and isinstance(text.value, str)
                    result[node.name][item.target.id] = text.value if documented else ""  # type: ignore[union-attr]
    return result


def test_help_explains_every_field_of_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_config(["--help"])
    assert end.value.code == 0

    def squeezed(text: str) -> str:
        return "".join(text.replace("│", " ").split())

    output = squeezed(capsys.readouterr().out)
    tables = {key.hint.__name__: f"--{table}." for table, key in keys_of(JobConfig).items()}
    tables |= {"Source": "--data.sources.0.", "Gate": "--stage.gates.0.", "Point": "--data.sources.0.schedule.0."}
    arrays = (("Data", "sources"), ("Stage", "gates"), ("Source", "schedule"))  # shown by the flags of their elements
    found = docstrings()
    assert set(found) == set(tables)
    for cls, prefix in tables.items():
        for field, text in found[cls].items():
            assert text, f"{cls}.{field} has no docstring"
            if (cls, field) not in arrays:
                assert f"{prefix}{field}" in output
                assert squeezed(text) in output, f"{cls}.{field}"


def test_help_says_range_and_decision(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--help"])
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "(default: 2048; at least 1; decides rows)",
        "(default: -1; at least 1, or -1; decides speed)",
        "(default: None; at least 1; decides model)",  # its table says so
        "(default: 10; at least 1)",  # decides nothing
    ):
        assert words in output


def test_the_documentation_lists_what_a_key_can_decide() -> None:
    page = (Path(job_config.__file__).parents[2] / "docs/configuration.md").read_text()
    assert re.findall(r"^\| `(\w+)` \| [^|]* \| (?:it is )?(?:another|the same) stage", page, re.M) == list(
        get_args(Decision)
    )


def test_help_can_be_cut_short() -> None:
    command = f"{sys.executable} -c 'from torchtitan.config import load_config; load_config([\"--help\"])' | head -n 1"
    ended = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith("usage")


def test_a_configuration_can_be_checked_without_being_run(tmp_path: Path) -> None:
    def check(*arguments: str) -> tuple[int, str]:
        ended = subprocess.run(
            [sys.executable, "-m", "torchtitan.extensions.cluster.check_config", *arguments],
            capture_output=True,
            text=True,
        )
        return ended.returncode, ended.stderr

    path = str(write(tmp_path, a='[[data.sources]]\nname = "x"\npath = "p"\n'))
    assert check("2", "--job.config_file", path) == (0, "")
    code, message = check("2", "--job.config_file", path, "--parallelism.tensor_parallel_degree", "4")
    assert code == 1 and message.startswith("error: [parallelism]") and message.count("\n") == 1


def test_the_package_does_not_import_torch() -> None:
    code = "import sys, torchtitan.config, torchtitan.config.checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_batch_is_that_of_the_previous_stage_as_it_was_run(tmp_path: Path) -> None:
    first = f'[job]\ndump_folder = "{tmp_path}/out"\n[training]\nseq_len = 64\nglobal_batch_size = 8\n'
    write(tmp_path, first=first)
    second = write(tmp_path, second='extends = "first.toml"\n[job]\ndump_folder = "x"\n[stage]\nafter = "first.toml"\n')
    third = write(tmp_path, third='extends = "second.toml"\n[job]\ndump_folder = "y"\n[stage]\nafter = "second.toml"\n')
    assert load(second).training.global_batch_tokens == load(third).training.global_batch_tokens == 512
    for folder, rows in (("out", 16), ("elsewhere", 32)):
        as_run = dump_toml(load(tmp_path / "first.toml", "--training.global_batch_size", str(rows)))
        write(tmp_path / folder, config=as_run)
    assert load(second).training.global_batch_tokens == load(third).training.global_batch_tokens == 1024
    assert load(second, "--stage.after_dump_folder", f"{tmp_path}/elsewhere").training.global_batch_tokens == 2048
    assert load(second, "--training.global_batch_tokens", "64").training.global_batch_tokens == 64


def test_two_stages_in_one_folder_are_no_circle(tmp_path: Path) -> None:
    """lineage.check_previous refuses them; it must get that far."""
    write(tmp_path, first=f'[job]\ndump_folder = "{tmp_path}"\n')
    second = write(tmp_path, second='extends = "first.toml"\n[stage]\nafter = "first.toml"\n')
    write(tmp_path, config=dump_toml(load(second)))
    assert load(second).job.dump_folder == str(tmp_path)
