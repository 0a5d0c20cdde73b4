"""Commands that write or read files beside a run: merged models, the released code's JSON, the cache of models."""

from pathlib import Path
from typing import Annotated

import typer

from rmx.commands.shared import PANELS, ConfigPath, DryRun, Overrides, app, open_run


@app.command(rich_help_panel=PANELS[3], epilog="Example: rmx merge config.yaml merged --gguf q8_0")
def merge(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(help="directory to write")],
    adapter: Annotated[Path | None, typer.Option(help="adapter directory; default: the run's own adapter")] = None,
    gguf: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE|FILE",
            help="also write a GGUF file with llama.cpp's converter (on PATH, or in the folder RMX_LLAMA_CPP). TYPE: "
            "f32, f16, bf16, q8_0, tq1_0, tq2_0 or auto, written into OUT. FILE: its name may end with a type, such as "
            "m-q8_0.gguf",
        ),
    ] = None,
    dry_run: DryRun = False,
    set_: Overrides = None,
) -> None:
    """Write the model with the adapter merged into its weights: a plain Hugging Face model, and a GGUF file."""
    run = open_run(config, set_)
    run.writes = not dry_run
    from rmx.interchange.gguf import convert, converter, wanted
    from rmx.progress import console
    from rmx.runs import merge

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    folder = merge.check(run, out, adapter)  # mistakes first: a merge takes minutes
    asked = None if gguf is None else wanted(gguf, folder)
    command = [] if asked is None else converter()
    if asked is not None:
        merge.check_writable(asked.file.parent, "--gguf")
    if dry_run:
        said = f"{adapter or run.path('adapter')} into {run.config.located_model.name}, in {run.dtype[0]}"
        say(f"merge: {said}, would be written to {folder}")
        if asked is not None:
            say(f"merge: {command[-1]} would write {asked.file} in {asked.type}")
        say("dry run: nothing was written")
        return
    say(f"merge: written {merge.merge(run, folder, adapter)}")
    if asked is not None:
        say(f"merge: {command[-1]} writes {asked.file} in {asked.type}")
        say(f"merge: written {convert(folder, asked, command)}")


@app.command(rich_help_panel=PANELS[3], epilog="Example: rmx push config.yaml me/my-adapter --dry-run")
def push(
    config: ConfigPath,
    repo: Annotated[str, typer.Argument(help="repository on the Hugging Face hub: USER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write the files and show the card, but send nothing")
    ] = False,
    set_: Overrides = None,
) -> None:
    """Upload the adapter to the Hugging Face hub, with a model card that shows the results of the run."""
    run = open_run(config, set_)
    from rmx.progress import console
    from rmx.reports.card import Told, staged, upload

    run.need("report")
    told = Told(run.config, run.evaluation(), run.tau(), run.history()[-1].step, repo)
    files = staged(told, run.path("adapter"), run.path("report.png"), run.path("hub"))
    if dry_run:
        print((run.path("hub") / "README.md").read_text(encoding="utf-8"))
        console.print(f"push: nothing sent; the files are in {run.path('hub')}", markup=False, soft_wrap=True)
        return
    console.print(
        f"push: {len(files)} files are at {upload(files, repo, private=private)}", markup=False, soft_wrap=True
    )


@app.command("export", rich_help_panel=PANELS[3], epilog="Example: rmx export config.yaml exported")
def export_command(
    config: ConfigPath, out: Annotated[Path, typer.Argument(help="directory to write")], set_: Overrides = None
) -> None:
    """Write problems, scored rollouts and training set as the JSON files of the method's released code."""
    run = open_run(config, set_)
    from rmx.interchange.transfer import export_run
    from rmx.progress import console

    for path in export_run(run, out):
        console.print(f"export: wrote {path}", markup=False, soft_wrap=True)


@app.command("export-task", rich_help_panel=PANELS[3], epilog="Example: rmx export-task config.yaml tasks")
def export_task_command(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="directory to write, for lm_eval's --include_path")],
    split: Annotated[str, typer.Option(help="problems of the task: evaluate, choose or train")] = "evaluate",
    name: Annotated[str, typer.Option(help="name of the task; default: rmx_ and the name of the run directory")] = "",
    set_: Overrides = None,
) -> None:
    """Write a run's problems as a task for lm-evaluation-harness, scored by rmx's verifier."""
    run = open_run(config, set_)
    from rmx.interchange.harness import export_task
    from rmx.progress import console

    task = export_task(run, out, split, name)
    written = ", ".join(str(path) for path in task.files)
    console.print(f"export-task: {task.problems} problems: {written}", markup=False, highlight=False, soft_wrap=True)
    print(task.command)


@app.command("import", rich_help_panel=PANELS[3], epilog="Example: rmx import config.yaml released")
def import_command(
    config: ConfigPath,
    source: Annotated[Path, typer.Argument(help="directory with records.json, rollouts.json, training_set.json")],
    set_: Overrides = None,
    any_prompt: Annotated[
        bool, typer.Option(help="accept prompts that differ from the ones this configuration renders")
    ] = False,
) -> None:
    """Start a run from JSON files of the method's released code. `rmx run` continues from there."""
    run = open_run(config, set_)
    from rmx.interchange.transfer import import_run

    import_run(run, source, any_prompt=any_prompt)


@app.command("cache", rich_help_panel=PANELS[3], epilog="Example: rmx cache --clear")
def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="delete all models in the cache")] = False,
) -> None:
    """List or delete the models in the cache, which were converted from GGUF files."""
    from rmx import digests
    from rmx.models import converted

    cache = digests.place()
    if cache is None:
        print("off: RMX_CACHE=off")
        return
    kept = converted.listed(cache)
    for entry in kept:
        print(f"{entry.bytes / 2**20:8,.0f} MiB  {entry.dtype:<9} {entry.path.name}  {entry.source}")
    total = f"{sum(entry.bytes for entry in kept) / 2**20:,.0f} MiB in {cache}"
    if clear:
        converted.clear(cache)
    print(f"deleted: {total}" if clear else total)
