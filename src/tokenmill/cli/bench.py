"""``tokenmill bench``: tasks x methods. Each task is a subcommand whose flags are the fields of its options."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from tokenmill import bench, settings

from ._output import Json, console, print_json, print_table, quiet_loading

if TYPE_CHECKING:
    from tokenmill.bench.result import Result
    from tokenmill.bench.runner import Progress

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_METHODS = "Methods, with commas: slug or slug:key=value:key=value. Plain is always there."


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    for name in bench.task_names():
        group.command(name)(_command(name))

    @group.callback()
    def about() -> None:
        """Measure methods of a task against the untouched model, in pairs, and keep the result lines.

        Example: [bold]tokenmill bench generate --methods plain,token-recycling --limit 5 --out runs/[/bold]
        """

    app.add_typer(group, name="bench")


def _command(task: str) -> Any:
    """The function of one task's subcommand, with a signature made from its options."""
    module = bench.load_task(task)
    known = settings.settings_of(module.Options)
    defaults = {name: setting.default for name, setting in known.items()}

    def command(*, methods: str, out: Path, sweep: str, as_json: bool, **given: Any) -> None:
        _run(task, methods, out, sweep, as_json, {k: v for k, v in given.items() if v != defaults[k]})

    some = ",".join(module.Task.BASELINES[:3])
    command.__doc__ = (
        f"{inspect.getdoc(module.Task)}\n\n"
        f"Example: [bold]tokenmill bench {task} --limit 3 --methods {some} --out runs/[/bold]"
    )
    own = {
        "methods": (Annotated[str, typer.Option(help=_METHODS)], "plain"),
        "out": (Annotated[Path, typer.Option(help="Folder of the result lines; what is there is kept.")], Path("runs")),
        "sweep": (Annotated[str, typer.Option(help="A sweep that ships, or your own file.toml.")], ""),
        "as_json": (Json, False),
    }
    fields = {name: (_flag(setting), setting.default) for name, setting in known.items()}
    parameters = [
        inspect.Parameter(name, _KEYWORD, annotation=hint, default=default)
        for name, (hint, default) in (own | fields).items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _flag(setting: settings.Setting) -> Any:
    text = setting.help[:1].upper() + setting.help[1:]
    if setting.choices:
        listed = f"{text.rstrip('.')}: {', '.join(map(str, setting.choices))}."
        return Annotated[str, typer.Option(help=listed)]
    return Annotated[setting.hint, typer.Option(help=text)]


def _run(task: str, methods: str, out: Path, sweep: str, as_json: bool, given: dict[str, Any]) -> None:
    """Run a task with what was given; a sweep is read first and flags win over it."""
    module = bench.load_task(task)
    where = f"bench {task}"
    seeds: tuple[int, ...] = (given.get("seed", 0),)
    names = [m for m in methods.split(",") if m.strip()]
    options = dict(given)
    if sweep:
        plan = bench.load_sweep(sweep)
        if plan.task != task:
            raise typer.BadParameter(f"the sweep {plan.name} is for the task {plan.task}")
        names = [*plan.methods, *(m for m in names if m != "plain")]
        seeds = seeds if "seed" in given else plan.seeds
        options = {**plan.options, **given}
    values = settings.from_text(where, module.Options, options)
    quiet_loading()
    command = _written(task, methods, out, sweep, given)
    lines: list[Result] = []
    for seed in seeds:
        chosen = dataclasses.replace(module.Options(**values), seed=seed)
        with _progress(quiet=as_json) as progress:
            lines += bench.run(module.Task(chosen), names, out, sweep=sweep, command=command, progress=progress)
    if as_json:
        print_json([dataclasses.asdict(line) for line in lines])
    else:
        _print(lines, out)
    if any(line.status == "failed" for line in lines):
        raise typer.Exit(1)


def _written(task: str, methods: str, out: Path, sweep: str, given: dict[str, Any]) -> str:
    """The command that does it again."""
    words = ["tokenmill", "bench", task]
    for name, value in given.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    words += ["--sweep", sweep] if sweep else []
    words += ["--methods", methods] if methods != "plain" else []
    return shlex.join([*words, "--out", str(out)])


@contextmanager
def _progress(*, quiet: bool) -> Generator[Progress, None, None]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, disable=quiet or not screen.is_terminal, transient=True) as bar:
        line = bar.add_task("starting", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(line, description=escape(what), completed=done, total=total or None)

        yield show


def _print(lines: list[Result], out: Path) -> None:
    rows = []
    for line in lines:
        label = " ".join([line.method, *(f"{k}={v}" for k, v in line.params.items())])
        if line.status == "failed":
            rows.append((line.data["kind"], label, "failed", "", "", "", escape(line.message)))
            continue
        ratio, low, high = line.ratio["ms_p50"]
        quality = ", ".join(f"{name} {value:.3f}" for name, value in line.quality.items())
        calls = line.cost.get("tokens_per_call")
        rows.append(
            (
                line.data["kind"],
                label,
                f"{line.cost['ms_p50']:,.0f}",
                f"{1 / ratio:.2f}x",
                f"{1 / high:.2f}-{1 / low:.2f}",
                f"{calls:.2f}" if calls is not None else "",
                quality,
            )
        )
    heads = ("data", "method", "ms", "speed", "95 %", "tokens/call", "quality")
    print_table(heads, rows, right=("ms", "speed", "95 %", "tokens/call"))
    console().print(f"\nresults in {out}; a report: tokenmill report {out} -o report.html")
