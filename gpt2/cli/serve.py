"""`gpt2 serve`: parse the options, load models, call `gpt2.serving`. It knows neither HTTP nor batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_option import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, default_model
from gpt2.cli.options import Choice, Command, option, pass_options, threads_option
from gpt2.weights.folder import locate_model

if TYPE_CHECKING:
    from gpt2.generation.chat_template import ChatTemplate
    from gpt2.model import GPT2
    from gpt2.serving.models import Served


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `gpt2 serve`."""

    from_pretrained: tuple[str, ...]
    host: str
    port: int
    api_key: str | None
    no_auth: bool
    allowed_host: tuple[str, ...]
    slots: int
    queue: int
    grace: float
    log: str
    speculate: bool
    draft_model: str | None
    device: str
    dtype: str


_EXAMPLES = """\b
Examples:
  gpt2 serve --from_pretrained gpt2-tiny --port 8000
  GPT2_SERVE_API_KEY=secret gpt2 serve --host 0.0.0.0 --allowed_host gpt2.example.org
  curl localhost:8000/v1/completions -d '{"prompt": "Once upon a time", "max_tokens": 20}'
"""
_model, _network = partial(option, group="Model"), partial(option, group="Network")
_load, _speed = partial(option, group="Requests"), partial(option, group="Speed")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS, epilog=_EXAMPLES)
@_model("--from_pretrained", multiple=True, metavar="NAME", help=f"{MODEL_HELP} Several times for several models.")
@_network("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@_network("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0 is any free one.")
@_network("--api_key", metavar="KEY", help="The key that clients must send. Better in GPT2_SERVE_API_KEY.")
@_network("--no_auth", is_flag=True, help="Let other machines in without a key.")
@_network("--allowed_host", multiple=True, metavar="NAME", help="A name of this server in the Host header, as of a proxy.")
@_load("--slots", type=click.IntRange(1, 1024), default=8, show_default=True, help="Most texts to run at a time.")
@_load("--queue", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Most requests that wait.")
@_load(
    "--grace",
    type=click.FloatRange(0, 86400),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long running requests may go on after SIGTERM.",
)
@_load("--log", type=Choice(["text", "json", "none"]), default="text", show_default=True, help="A line for each request.")
@_speed("--speculate", is_flag=True, help="Draft tokens while one text runs alone: the same text, faster if it repeats.")
@_speed("--draft_model", metavar="NAME", help="Draft them with this smaller model of the same vocabulary.")
@threads_option("Speed")
@_speed("--device", default="auto", show_default=True, help=DEVICE_HELP)
@_speed("--dtype", default="float32", show_default=True, help=DTYPE_HELP)
@pass_options(ServeOptions)
def serve(ctx: click.Context, options: ServeOptions) -> None:
    """Serve models with OpenAI's API, and a page to play with.

    The first model is loaded at once, others when they are first used. A line on stderr gives the address when the server
    is ready. SIGTERM and Ctrl-C end it after the running requests; a second signal ends it at once.
    """
    if not math.isfinite(options.grace):
        raise click.UsageError(f"--grace={options.grace} must be a number of seconds")
    if options.api_key is not None and not options.api_key.strip():
        raise click.UsageError("--api_key is empty: give a key, or leave the option out")
    names = list(options.from_pretrained) or [default_model()]
    for name in (*names, *filter(None, [options.draft_model])):
        locate_model(name)  # an unknown name is an error at once
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise click.ClickException(f"gpt2 serve needs {error.name}: pip install '.[serve]'") from None
    from gpt2.serving import kernel_memory

    kernel_memory.bound_kernel_memory()  # before what imports torch
    from gpt2.serving.gate import Access, is_loopback
    from gpt2.serving.server import Server, Settings, log_to_stderr

    if not is_loopback(options.host) and options.api_key is None and not options.no_auth:
        raise click.UsageError(
            f"--host={options.host} lets other machines in: set GPT2_SERVE_API_KEY, or add --no_auth if that is intended"
        )
    access = Access(api_key=options.api_key, hosts=(*options.allowed_host, options.host), log=options.log)
    settings = Settings(
        host=options.host,
        port=options.port,
        slots=options.slots,
        max_waiting=options.queue,
        grace=options.grace,
        no_auth=options.no_auth,
        access=access,
    )
    draft_model = cache(lambda: _load_model(options.draft_model, options) if options.draft_model else None)
    server = Server(names, lambda name: _load_served(name, draft_model(), options), settings)
    log_to_stderr()
    server.run(lambda served: click.echo(_ready(served, server.address, options.slots), err=True))


def _ready(served: Served, address: str, slots: int) -> str:
    """The line that says where the server is, and how much memory its slots may take."""
    per_slot = served.bytes_per_slot
    return f"{served.name} is ready at {address} ({slots} slots, {_megabytes(per_slot)} each when full)"


def _megabytes(n_bytes: int) -> str:
    size = n_bytes / 1e6
    return f"{size:,.0f} MB" if size >= 10 else f"{size:.2g} MB"


def _load_served(name: str, draft_model: GPT2 | None, options: ServeOptions) -> Served:
    from gpt2.fast.plan import DecodePlan
    from gpt2.generation.slot_batch import SlotBatch
    from gpt2.serving.models import Served
    from gpt2.weights.tokenizer import load_tokenizer_for

    model = _load_model(name, options)
    if options.slots > 1 and SlotBatch.fits(model):
        DecodePlan(model).pack_for_rows()  # now, because later it would hold running texts up for a second or two
    return Served(name, model, load_tokenizer_for(model), template_of(model), options.speculate, draft_model)


def _load_model(name: str, options: ServeOptions) -> GPT2:
    from gpt2.pretrained import load_model

    return load_model(locate_model(name), device=options.device, dtype=options.dtype)


def template_of(model: GPT2) -> ChatTemplate | None:
    """The template in the model's folder: the one of fine-tuning on instructions, else a chat template, else None."""
    from gpt2.finetuning.template import TEMPLATE_FILE, InstructionTemplate
    from gpt2.generation.chat_template import ChatTemplate
    from gpt2.weights.tokenizer import folder_of

    folder = folder_of(model)
    if folder is None:
        return None
    if (folder / TEMPLATE_FILE).is_file():
        return ChatTemplate(InstructionTemplate.load(folder).to_jinja(), str(folder / TEMPLATE_FILE))
    return ChatTemplate.load(folder)
