"""`bsattn train` and `bsattn generate`, as click commands."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from .errors import InputError
from .settings import DEFAULT_MINUTES, read_toml, settings_from

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "bfloat16": "bfloat16", "f32": "float32", "float32": "float32"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=None, version="0.1.0", prog_name="bsattn")
def bsattn() -> None:
    """Exact block-sparse attention: train a byte-level language model with it, sample from it, look at layouts."""


def _setting(*names: str, **options: Any) -> Callable[..., Any]:
    """An option that overrides the setting of its name; absent, it decides nothing."""
    return click.option(*names, default=None, **options)


@bsattn.command()
@_setting(
    "--data",
    multiple=True,
    metavar="PATH",
    help="File, folder or glob; repeat for more. Default: the running Python's standard library.",
)
@_setting("--attention", help="base (a fixed pattern), hierarchical, adaptive (a gate) or dense. Default: base.")
@_setting("--pattern", help="Of base attention: local_window, dilated_sparse or global_local.")
@_setting("--density", type=float, help="Active / allowed blocks to keep, in (0, 1].")
@_setting("--block-size", type=int, help="Tokens per block.")
@_setting("--window-size", type=int, help="Tokens of the local window (a gate always keeps it).")
@_setting("--global-tokens", type=int, help="Leading tokens that every byte sees (global_local).")
@_setting("--dilation-rate", "dilation_rates", type=int, multiple=True, help="Block stride of dilated_sparse; repeat.")
@_setting("--query-block-size", type=int, help="Queries that share their picks (adaptive). Default: the block size.")
@_setting("--distill-rows", type=int, help="Query blocks whose true masses teach the gate (adaptive). Default: 0.")
@_setting("--start-from", metavar="RUN", help="Start with the weights of another run of the same sizes.")
@_setting("--context", type=int, help="Bytes per training sequence (any number). Default: 8192.")
@_setting("--batch", type=int, help="Sequences per step.")
@_setting("--steps", type=int, help="Optimizer steps.")
@_setting("--minutes", type=float, help=f"Budget of the whole run, turned into steps. Default: {DEFAULT_MINUTES}.")
@_setting("--seed", type=int, help="Of weights and batches. Default: 0.")
@_setting("--width", type=int, help="Model width.")
@_setting("--layers", type=int, help="Blocks.")
@_setting("--head-dim", type=int, help="Dimensions per head.")
@_setting("--device", help="auto, cpu, cuda, cuda:1, …")
@_setting("--dtype", type=click.Choice(list(_DTYPES)), help="bf16 where it is fast, else f32, by default.")
@_setting("--threads", type=int, help="CPU threads (of each process).")
@_setting("--nproc", type=int, help="Processes that share every sequence, each with a slice of it. Default: 1.")
@click.option("--config", "config_file", type=Path, help="TOML file of settings; flags override it.")
@click.option("--name", help="Folder of the run under --runs. Default: date and time.")
@click.option("--runs", "runs_folder", type=Path, default=Path("runs"), show_default=True, help="Where runs are kept.")
@click.option("--resume", is_flag=True, help="Continue the run of --name (or the latest), bit for bit.")
@click.option("--compare", type=click.Choice(["dense"]), help="Then train dense controls and compare.")
@click.pass_obj
def train(
    begun: float | None,
    config_file: Path | None,
    name: str | None,
    runs_folder: Path,
    resume: bool,
    compare: str | None,
    **flags: Any,
) -> None:
    """Train a byte-level language model with block-sparse causal attention on real text."""
    if flags["start_from"] and not Path(flags["start_from"]).is_dir():
        flags["start_from"] = str(runs_folder / flags["start_from"])
    given = _given(config_file, flags)
    from .session import train_session

    folder = _latest(runs_folder) if resume and name is None else runs_folder / (name or _timestamp())
    train_session(folder, given, resume=resume, compare=compare == "dense", begun=begun or time.perf_counter())


@bsattn.command()
@click.argument("run", type=Path)
@click.option("--prompt", default="def ", show_default=True, help="Text to continue.")
@click.option("--tokens", type=click.IntRange(min=0), default=500, show_default=True, help="Bytes to generate.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0: the likeliest byte."
)
@click.option("--top-k", type=click.IntRange(1, 256), help="Sample among so many likeliest bytes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--runs", "runs_folder", type=Path, default=Path("runs"), show_default=True, help="Where runs are kept.")
def generate(
    run: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    device: str,
    runs_folder: Path,
) -> None:
    """Continue a prompt with the model of RUN (a folder, or a name under --runs)."""
    from .session import generate_session

    if not prompt:
        raise InputError("prompt: expected at least one character, got none")
    folder = run if run.is_dir() or not (runs_folder / run).is_dir() else runs_folder / run
    out = sys.stdout
    pieces = generate_session(
        folder,
        prompt.encode("utf-8", errors="surrogateescape"),
        tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        device=device,
    )
    for piece in pieces:
        out.write(piece.encode(out.encoding or "utf-8", errors="replace").decode(out.encoding or "utf-8"))
        out.flush()
    out.write("\n")


@bsattn.command("show", add_help_option=False)
def show() -> None:
    """Draw a layout: `bsattn show --help` for its options."""


@bsattn.command("ring-plan", add_help_option=False)
def ring_plan() -> None:
    """Print the exchange plan of a ring: `bsattn ring-plan --help` for its options."""


def _given(config_file: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Settings from the file and from flags; flags win."""
    values: dict[str, Any] = read_toml(config_file) if config_file is not None else {}
    values.pop("facts", None)  # what a run's own config.toml says about its machine
    flags = {name: value for name, value in flags.items() if value is not None and value != ()}
    if "dtype" in flags:
        flags["dtype"] = _DTYPES[flags["dtype"]]
    if "steps" in flags and "minutes" in flags:
        raise InputError("minutes: has no effect beside --steps; give one of them")
    if "steps" in flags:
        values.pop("minutes", None)
    if "minutes" in flags:
        values.pop("steps", None)
    values.update(flags)
    settings_from(values, str(config_file or "command line"))
    return values


def _timestamp() -> str:
    return datetime.now().strftime("%Y-%m-%d-%H%M%S")


def _latest(runs_folder: Path) -> Path:
    found = sorted(runs_folder.glob("*/config.toml"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"run: nothing to resume: no run in {runs_folder}")
    return found[-1].parent
