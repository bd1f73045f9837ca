"""`minigpt serve`: a checkpoint behind an HTTP endpoint in OpenAI's style, and a page to try it on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt_cli.commands.console import Debug, find_checkpoint, note, size
from minigpt_cli.commands.options import CKPT, DEVICE, PRECISION
from minigpt_cli.core.errors import MinigptError, Stopped, UserError

if TYPE_CHECKING:
    from minigpt_cli.core.config import ModelConfig

DEFAULT_SLOTS = 32
CACHE_BYTES = 1 << 30  # that the keys and values of the default number of slots may take


def serve(
    ckpt: Annotated[Path, CKPT],
    host: Annotated[
        str, typer.Option("--host", help="The address to listen at. 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="MINIGPT_API_KEY", help="Whoever asks must know it. Better in the variable."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            "--slots", min=1, max=1024,
            help=f"How many texts are computed together. [default: {DEFAULT_SLOTS}, or what 1 GB of memory holds]",
        ),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=0, help="How many more may wait.")] = 128,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The most that a request may ask for.")] = 4096,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that a request may take.")] = 600,
    device: Annotated[str, DEVICE] = "auto",
    precision: Annotated[str, PRECISION] = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", help="A line on stderr for each request.")] = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Serve a trained model over HTTP: /v1/completions and /v1/models in OpenAI's style, and a page at /.

    Requests that come at the same time are computed together. One with a seed is computed by itself, so that it gives
    the same text whatever else is asked for. Ctrl-C lets running requests finish for a moment, then stops.

    Example: minigpt serve --ckpt checkpoints/best.safetensors, then open http://127.0.0.1:8000
    """
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise MinigptError("serving needs Starlette and uvicorn, which are not installed: pip install 'minigpt[serve]'")
    if api_key is not None and (not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key):
        raise UserError("--api-key: letters, digits and signs of ASCII, without spaces")

    from minigpt_cli.core.checkpoint import load
    from minigpt_cli.core.config import RuntimeConfig, parse_section
    from minigpt_cli.core.generate import cache_dtype, for_decoding
    from minigpt_cli.core.runtime import choose_decoding_runtime, describe_device, require_runtime
    from minigpt_cli.core.signals import StopSignals
    from minigpt_cli.extras.serve.api import Completions
    from minigpt_cli.extras.serve.engine import Engine
    from minigpt_cli.extras.serve.server import Served, listen, make_app, run

    asked = parse_section(RuntimeConfig, {"device": device, "precision": precision}, "serve")
    require_runtime(asked)  # a device that is not there is said before a large file is read
    with StopSignals() as stop, listen(host, port) as listening:
        ckpt = find_checkpoint(ckpt)
        checkpoint = load(ckpt, weights_only=True)
        model = checkpoint.model()
        parameters = model.parameter_counts()["total"]
        runtime = choose_decoding_runtime(asked, parameters)
        model = for_decoding(model.to(runtime.device), runtime)
        each = _cache_bytes(checkpoint.config.model, cache_dtype(model, 1).itemsize)
        slots = slots or max(1, min(DEFAULT_SLOTS, CACHE_BYTES // max(1, each)))
        try:
            engine = Engine(
                model, checkpoint.tokenizer.token_bytes(), slots=slots, queue=queue,
                record=runtime.record if runtime.records else None, note=note,
            )  # fmt: skip
        except (RuntimeError, MemoryError):
            raise MinigptError(f"no memory for --slots {slots} ({size(slots * each)}); choose fewer") from None
        served = Served(
            ckpt.stem, int(ckpt.stat().st_mtime), checkpoint.config.model.block_size, checkpoint.tokenizer.vocab_size,
            parameters,
        )  # fmt: skip
        completions = Completions(engine, checkpoint.tokenizer, served.name, max_tokens=max_tokens, seconds=timeout)
        app = make_app(engine, completions, served, names=(host.lower(),), key=api_key, log=note, verbose=verbose)
        address, port = listening.getsockname()[:2]
        where = f"[{address}]" if ":" in address else address
        if not _only_here(address) and api_key is None:
            note(f"warning: {address} lets other machines in, and there is no --api-key: anybody may use this model")
        note(
            f"{ckpt}: {parameters:,} parameters, {runtime.decoding} on {describe_device(runtime.device)}; "
            f"{slots} texts at a time ({size(slots * each)} of keys and values)"
        )
        note(f"serving on http://{where}:{port} (the page; the API is at /v1). Ctrl-C stops.")
        run(app, engine, listening, stop)
        raise Stopped("stopped", stop.exit_code)


def _cache_bytes(config: ModelConfig, element: int) -> int:
    """What the keys and values of one text take."""
    heads = (config.n_kv_head or config.n_head) * config.each_head
    return 2 * config.n_layer * config.block_size * heads * element


def _only_here(address: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(address).is_loopback
