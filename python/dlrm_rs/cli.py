"""The commands of `dlrm-rs`. Knows their options, and nothing of what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import dlrm_rs
from dlrm_rs.bench import arguments as choice
from dlrm_rs.bench.optimizers import OPTIMIZERS
from dlrm_rs.data.synthetic import SHAPES

# A traceback with every local variable of a training loop hides the message.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def dlrm_rs_command() -> None:
    """Embedding tables for PyTorch recommenders, in Rust."""


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training flights.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Flights in a step.")] = 512,
    embedding_dim: Annotated[int, typer.Option(min=1, help="Elements of an embedding row.")] = 32,
    table_lr: Annotated[float, typer.Option(min=0, help="Adagrad's learning rate, for the tables.")] = 0.005,
    dense_lr: Annotated[float, typer.Option(min=0, help="AdamW's learning rate, for the dense layers.")] = 0.004,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights and the order of the flights.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="For torch and dlrm_rs alike.", show_default="torch's choice")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="Train on the last 30,000 training flights alone.")] = False,
) -> None:
    """Train a DLRM on real flights twice, with torch's embeddings and with dlrm_rs's, compare, and quantize."""
    from dlrm_rs.demo.arguments import Arguments  # here, as what it brings in takes seconds
    from dlrm_rs.demo.run import run

    run(Arguments(epochs, batch_size, embedding_dim, table_lr, dense_lr, seed, threads, quick), output, Console())


def _by_family(names: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{family}: {', '.join(of_family)}" for family, of_family in names.items())


@app.command()
def bench(
    family: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(choice.FAMILIES)}; repeat for more.", show_default="all")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SHAPES)}; repeat for more.", show_default=_by_family(choice.DEFAULT_SHAPES)),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeat for more.", show_default="those of the shape")
    ] = None,
    row_format: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{_by_family(choice.FORMATS)}. Repeat for more.", show_default=_by_family(choice.DEFAULT_FORMATS)
        ),
    ] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help=f"Of steps: {', '.join(OPTIMIZERS)}; repeat for more.", show_default="all")
    ] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(choice.DISTRIBUTIONS)}; repeat for both.", show_default="those of the shape"),
    ] = None,
    threads: Annotated[
        list[str] | None,
        typer.Option(help="A number, or all CPUs; repeat for more.", show_default=", ".join(choice.THREADS)),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="For each case, all sides together.", show_default=f"{choice.Arguments.seconds:g}"),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Cut tables to this many rows.", show_default=f"all; step: {choice.STEP_ROWS:,}"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for bench.png and bench.json.")] = Path("bench-output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cases on small tables, with all CPUs: two minutes.")
    ] = False,
) -> None:
    """Time lookups, quantization and training steps beside every other library that is installed, checked first.

    All of it takes about half an hour for each number of threads on 2 cores with --rows 250000, and longer, with
    more memory, without.
    """
    from dlrm_rs.bench.run import NothingToTimeError, run  # here, as what it brings in takes seconds

    chosen = {
        "families": family,
        "shapes": shape,
        "batches": batch_size,
        "formats": row_format,
        "optimizers": optimizer,
        "distributions": ids,
        "threads": threads,
        "seconds": seconds,
        "rows": rows,
    }
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in chosen.items() if x}
    try:
        arguments = choice.Arguments.chosen(quick, given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        run(arguments, output, Console())
    except NothingToTimeError as error:
        Console(stderr=True).print(f"{error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None


@app.command()
def info() -> None:
    """Print what the engine runs on."""
    table = Table(show_header=False)
    for name, value in dlrm_rs.info().items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)
